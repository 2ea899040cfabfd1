"""What a method is, to the trainer."""

from torch import nn

from relora_ds.config import Recipe, ReLoRAConfig
from relora_ds.lowrank.wrap import parameter_groups


class Method:
    """A way to train a network. The defaults are those of ordinary full-rank training.

    Attributes:
        relora: the low-rank configuration that the engine gets, or None for a plain model.
    """

    relora: ReLoRAConfig | None = None

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def problems(self, model: nn.Module) -> list[str]:
        """Why the method cannot train `model` (on meta), one message each; asked before anything is built."""
        return []

    def warnings(self, model: nn.Module) -> list[str]:
        """Return what training `model` (on meta) with this method leaves out; asked where there are no problems."""
        return []

    def prepare(self, model: nn.Module) -> nn.Module:
        """Surgery on the module tree of a model without values; returns the model to train."""
        return model

    def param_groups(self, model: nn.Module) -> list[dict]:
        """Groups for AdamW."""
        return parameter_groups(model, weight_decay=self.recipe.optim.weight_decay)

    def after_step(self, engine) -> None:
        """Called after every applied optimizer step, on every rank."""

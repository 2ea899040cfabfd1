"""What methods have in common that put layers of ours into the model, as section `relora` says."""

from typing import TYPE_CHECKING

from relora_ds.config import Recipe, ReLoRAConfig
from relora_ds.methods.base import TrainingMethod

if TYPE_CHECKING:
    from torch import nn


class Wrapped(TrainingMethod):
    """A method with layers whose weights DeepSpeed's optimizer does not train."""

    relora: ReLoRAConfig

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.relora = recipe.relora

    def problems(self, model: "nn.Module") -> list[str]:
        """Return why `model` cannot be wrapped."""
        from relora_ds.lowrank.wrap import problems

        return problems(model, self.relora, base=self.has_base)

    def warnings(self, model: "nn.Module") -> list[str]:
        """Return what stays frozen though one might expect it to train."""
        from relora_ds.lowrank.wrap import warnings

        return warnings(model, self.relora)

    def prepare(self, model: "nn.Module") -> "nn.Module":
        """Replace the target layers, and freeze what does not train."""
        from relora_ds.lowrank.wrap import wrap_quietly

        return wrap_quietly(model, self.relora, seed=self.recipe.seed, base=self.has_base)

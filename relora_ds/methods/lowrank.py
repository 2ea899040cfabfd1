"""What methods with low-rank updates have in common: the surgery, and a warm start before them."""

from typing import TYPE_CHECKING

from relora_ds.config import Recipe, ReLoRAConfig
from relora_ds.methods.base import TrainingMethod

if TYPE_CHECKING:
    from torch import nn


class LowRank(TrainingMethod):
    """A low-rank pair per linear layer, over a frozen weight or in place of one."""

    relora: ReLoRAConfig

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.relora = recipe.relora

    @property
    def full_rank_steps(self) -> int:
        """Those of the warm start."""
        return self.recipe.warm_start_steps

    @property
    def speed_key(self) -> list:
        """What is computed beside the frozen weights, and how these are stored."""
        relora = self.relora
        return [self.name, relora.r, relora.target_modules, relora.trainable_modules, relora.frozen_dtype]

    def problems(self, model: "nn.Module") -> list[str]:
        """Return why the low-rank updates do not fit `model`."""
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

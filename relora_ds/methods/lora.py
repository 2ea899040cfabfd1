"""LoRA as a way to pre-train: the baseline that ReLoRA has to beat.

The paper's baseline has no frozen weight at all, `y = s·B·A·x` (`lora.base: none`). With a base it is
PEFT's LoRA, on random weights or on those that a warm start leaves behind. It never restarts.
"""

import dataclasses

from torch import nn

from relora_ds.lowrank.wrap import problems, warnings, wrap_quietly
from relora_ds.methods.base import Method


class LoRA(Method):
    """One low-rank pair per linear, from the first step to the last."""

    def __init__(self, recipe):
        super().__init__(recipe)
        self.relora = dataclasses.replace(recipe.relora, restart_every=None)

    def problems(self, model: nn.Module) -> list[str]:
        return problems(model, self.relora, base=self._has_base)

    def warnings(self, model: nn.Module) -> list[str]:
        return warnings(model, self.relora)

    def prepare(self, model: nn.Module) -> nn.Module:
        return wrap_quietly(model, self.relora, seed=self.recipe.seed, base=self._has_base)

    @property
    def _has_base(self) -> bool:
        return self.recipe.lora.base != "none"

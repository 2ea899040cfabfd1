"""ReLoRA (arXiv 2307.05695): low-rank updates, merged and restarted."""

from torch import nn

from relora_ds.lowrank.wrap import problems, warnings, wrap_quietly
from relora_ds.methods.base import Method


class ReLoRA(Method):
    """`W + s·B·A` with W frozen; every `relora.restart_every` steps B·A is merged into W and starts anew."""

    def __init__(self, recipe):
        super().__init__(recipe)
        self.relora = recipe.relora

    def problems(self, model: nn.Module) -> list[str]:
        return problems(model, self.relora)

    def warnings(self, model: nn.Module) -> list[str]:
        return warnings(model, self.relora)

    def prepare(self, model: nn.Module) -> nn.Module:
        return wrap_quietly(model, self.relora, seed=self.recipe.seed)

    def after_step(self, engine) -> None:
        engine.restart_if_due()

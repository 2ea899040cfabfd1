"""SwitchLoRA (arXiv 2406.06564): low-rank updates whose vectors change places with candidates, a few at every step.

See `lowrank.switching` for what is switched and `zero.switches` for how. The method switches before a step, by the
gradients of that step; here it is after the step before, which is the same for everything but clipping: the norm of the
first gradient of a vector that is frozen is that of the new counterpart.
"""

import copy
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from relora_ds.config import Recipe
from relora_ds.methods.lowrank import LowRank

_OF_RESTARTS = (
    *("restart_every", "restart_warmup_steps", "optimizer_reset", "reset_ratio", "restart_init", "gradient_estimate"),
    *("residual_every", "residual_lr"),
)


class SwitchLoRA(LowRank):
    """One low-rank pair per linear over a W in fp32, which takes what switches of its vectors change."""

    name = "switchlora"
    sections = ("switchlora",)
    can_warm_start = False
    no_warm_start = "switches vectors by a schedule that spans a whole run"
    defaults = MappingProxyType({"relora.lora_alpha": 1.0, "relora.frozen_dtype": "fp32"})

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.relora = copy.copy(recipe.relora)  # unchecked: the recipe's own checks name what is wrong
        for name in _OF_RESTARTS:
            setattr(self.relora, name, getattr(type(self.relora), name))
        self.switching = recipe.switchlora

    @property
    def full_rank_steps(self) -> int:
        """None: A and B begin with values of the method, and W with what is left."""
        return 0

    def recipe_problems(self) -> Iterator[str]:
        """Yield what switches do not go with."""
        recipe, relora = self.recipe, self.recipe.relora
        if relora.frozen_dtype != "fp32":
            yield (
                f"relora.frozen_dtype: {relora.frozen_dtype} may round W at every switch of method switchlora; use "
                "relora.frozen_dtype=fp32"
            )
        if relora.trains != "both":
            yield f"relora.trains: {relora.trains} has no rows of A to switch; use relora.trains=both"
        if relora.lora_dropout:
            yield (
                f"relora.lora_dropout: {relora.lora_dropout} acts on B·A alone, so that a switch would change the "
                "function; use relora.lora_dropout=0"
            )
        if relora.target_parameters:
            yield (
                f"relora.target_parameters: {relora.target_parameters} names experts in one parameter, and method "
                "switchlora is for matrices; use null"
            )
        if recipe.optim.name != "adamw":
            yield f"optim.name: {recipe.optim.name} keeps no step count for each vector; use optim.name=adamw"
        if recipe.optim.weight_decay:
            yield (
                f"optim.weight_decay: {recipe.optim.weight_decay} of B would have to act on W too, which method "
                "switchlora does not; use optim.weight_decay=0"
            )
        if recipe.warm_start_steps:
            yield (
                f"warm_start_steps: {recipe.warm_start_steps} before method switchlora is not supported; use "
                "warm_start_steps=0, or init_from=RUN"
            )

    def recipe_warnings(self) -> Iterator[str]:
        """Yield what is for restarts alone, and freezes that do not end."""
        relora, own = self.recipe.relora, self.recipe.switchlora
        for name in _OF_RESTARTS:
            value = getattr(relora, name)
            if name != "restart_warmup_steps" and value != getattr(type(relora), name):  # a part of restart_every
                yield f"relora.{name}: {value} has no effect with method switchlora, which never restarts"
        if own.freeze_steps >= own.interval:
            yield (
                f"switchlora.freeze_steps: {own.freeze_steps} is not below switchlora.interval {own.interval}: until "
                "fewer vectors are switched, none trains"
            )

    def deepspeed_problems(self, settings: dict[str, Any]) -> list[str]:
        """Return what of a DeepSpeed configuration switches do not go with."""
        zero = settings.get("zero_optimization") or {}
        return [
            f"deepspeed: zero_optimization.{name} does not go with method switchlora; leave it out"
            for name in ("offload_optimizer", "offload_param")
            if (zero.get(name) or {}).get("device", "none") != "none"
        ]

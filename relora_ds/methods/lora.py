"""LoRA as a way to pre-train: the baseline that ReLoRA has to beat.

The paper's baseline has no frozen weight at all, `y = s·B·A·x` (`lora.base: none`). With a base it is
PEFT's LoRA, on random weights or on those that a warm start leaves behind. It never restarts.
"""

import copy
import dataclasses
from collections.abc import Iterator

from relora_ds.config import Recipe
from relora_ds.config.methods import warm_start_of
from relora_ds.methods.lowrank import LowRank

_OF_THE_BASE = ("product", "frozen_dtype", "frozen_double_quant", "frozen_master", "frozen_placement")


class LoRA(LowRank):
    """One low-rank pair per linear, from the first step to the last."""

    name = "lora"
    sections = ("lora",)

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.relora = copy.copy(recipe.relora)  # unchecked: the recipe's own checks name what is wrong
        self.relora.restart_every = None
        self.relora.residual_every = None
        self.has_base = recipe.lora.base != "none"

    @classmethod
    def of_warm_start(cls, recipe: Recipe) -> LowRank:
        """Return LoRA on the initial weights: without a base it would leave weights of rank r."""
        relora = copy.copy(recipe.relora)
        relora.restart_every = relora.residual_every = None
        return super().of_warm_start(
            dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, base="random"), relora=relora)
        )

    @property
    def label(self) -> str:
        """The base makes it another method."""
        return f"lora ({self.recipe.lora.base} base)"

    @property
    def full_rank_steps(self) -> int:
        """Without a base, or on a random one, a warm start would be lost."""
        return self.recipe.warm_start_steps if self.recipe.lora.base == "warm_start" else 0

    @property
    def speed_key(self) -> list:
        """Without a base there is less to compute."""
        return [*super().speed_key, self.recipe.lora.base]

    def recipe_problems(self) -> Iterator[str]:
        """Yield what does not go with the base."""
        recipe = self.recipe
        if recipe.lora.base == "warm_start" and not (recipe.warm_start_steps or recipe.init_from):
            yield "lora.base: warm_start has nothing to start from; set warm_start_steps or init_from"
        if recipe.lora.base == "none" and (recipe.init_from or recipe.model.init == "pretrained"):
            field = "init_from" if recipe.init_from else "model.init"
            yield (
                f"{field}: {recipe.init_from or 'pretrained'} does not fit lora.base none, which has no W and would "
                "drop the weights of the wrapped layers; use lora.base=warm_start"
            )

    def recipe_warnings(self) -> Iterator[str]:
        """Yield what has no effect on this base, or without restarts."""
        recipe, relora = self.recipe, self.recipe.relora
        if recipe.warm_start_steps and not self.full_rank_steps:
            yield (
                f"warm_start_steps: {recipe.warm_start_steps} has no effect with method lora on lora.base "
                f"{recipe.lora.base}"
            )
        if not self.has_base:
            for name in _OF_THE_BASE:
                if (value := getattr(relora, name)) != getattr(type(relora), name):
                    yield f"relora.{name}: {value} has no effect with lora.base none, which has no W"
        warm = warm_start_of(recipe).relora if self.warm_start_steps else None
        if relora.residual_every is not None and (warm is None or warm.residual_every is None):
            yield f"relora.residual_every: {relora.residual_every} has no effect with method lora, whose W stays"
        if relora.restart_every is not None and (warm is None or warm.restart_every is None):
            yield f"relora.restart_every: {relora.restart_every} has no effect with method lora, which never restarts"

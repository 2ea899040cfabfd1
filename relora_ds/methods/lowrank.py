"""What methods with low-rank updates have in common: a warm start before them."""

import copy
import dataclasses

from relora_ds.config import Recipe
from relora_ds.config.methods import method_class, warm_start_of
from relora_ds.methods.wrapped import Wrapped


class LowRank(Wrapped):
    """A low-rank pair per linear layer, over a frozen weight or in place of one."""

    @classmethod
    def of_warm_start(cls, recipe: Recipe) -> "LowRank":
        """Return the method of a run that is as long as the warm start.

        Of `relora`, what the run's method stands for is not read (but how often it restarts), and what this method
        stands for holds. Its seed is another one: else A would become in the later phase what it has been in this one.
        """
        relora = copy.copy(recipe.relora)  # unchecked: the recipe's own checks name what is wrong
        for key, value in method_class(recipe.method).defaults.items():
            section, _, name = key.rpartition(".")
            if section == "relora" and name != "restart_every" and getattr(relora, name) == value:
                setattr(relora, name, getattr(type(relora), name))
        for key, value in cls.defaults.items():
            setattr(relora, key.removeprefix("relora."), value)
        if relora.trains != "B":  # what goes with a one-sided chain alone
            relora.residual_every = None
        return cls(
            dataclasses.replace(
                recipe,
                method=cls.name,
                seed=(recipe.seed + 2**63) % 2**64,
                warm_start_steps=0,
                train=dataclasses.replace(recipe.train, steps=recipe.warm_start_steps, tokens=None),
                relora=relora,
            )
        )

    @property
    def full_rank_steps(self) -> int:
        """Those of the warm start."""
        return self.recipe.warm_start_steps

    @property
    def speed_key(self) -> list:
        """What is computed beside the frozen weights, and how these are stored."""
        relora = self.relora
        warm = warm_start_of(self.recipe).speed_key if self.full_rank_steps else []
        return [
            self.name,
            relora.r,
            relora.target_modules,
            relora.trainable_modules,
            relora.frozen_dtype,
            relora.trains,
            warm,
            *([] if relora.residual_every is None else [relora.residual_every]),
        ]

"""What methods have in common whose update of a weight needs its whole gradient.

ZeRO's shards have parts of a gradient only. So the weights do not belong to DeepSpeed's optimizer: each has an owner
among the ranks, which gets the reduced gradient and updates the weight by a rule of `relora_ds.matrix`. What is no
target, such as norms, trains with AdamW.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from relora_ds.config import Recipe
from relora_ds.methods.wrapped import Wrapped

if TYPE_CHECKING:
    from torch import nn

    from relora_ds.matrix.adam import ProjectedAdam
    from relora_ds.matrix.optimizer import MatrixOptimizer

_OF_FACTORS = ("restart_every", "restart_init", "gradient_estimate", "residual_every", "lora_dropout")
_WHAT_AND_HOW = (
    *("target_modules", "exclude_modules", "target_parameters", "trainable_modules"),
    *("frozen_dtype", "frozen_double_quant", "frozen_master", "frozen_placement"),
)


class Owner(Wrapped):
    """Full-rank training in which owners update the weights of linears.

    Attributes:
        has_rank: whether the rule works in a subspace, of rank `relora.r`.
        takes_experts: whether it takes weights that hold a matrix for each expert.
    """

    has_owners = True
    has_rank: ClassVar[bool] = False
    takes_experts: ClassVar[bool] = True

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.relora = copy.copy(recipe.relora)  # unchecked: the recipe's own checks name what is wrong
        self.relora.trains = "none"
        for name in _OF_FACTORS:
            setattr(self.relora, name, getattr(type(self.relora), name))

    @classmethod
    def of_warm_start(cls, recipe: Recipe) -> "Owner":
        """Return the method with what its name stands for, where the recipe does not say otherwise."""
        for key, value in cls.defaults.items():
            name, _, leaf = key.rpartition(".")
            section = copy.copy(getattr(recipe, name))  # unchecked: the recipe's own checks name what is wrong
            if getattr(section, leaf) == getattr(type(section), leaf):
                setattr(section, leaf, value)
            recipe = dataclasses.replace(recipe, **{name: section})
        return cls(recipe)

    @property
    def rank(self) -> int | None:
        """Of the subspace, for rules that have one."""
        return self.relora.r if self.has_rank else None

    @property
    def speed_key(self) -> list:
        """What owners compute, and how weights are stored."""
        relora = self.relora
        return [self.name, self.rank, relora.target_modules, relora.trainable_modules, relora.frozen_dtype]

    def problems(self, model: "nn.Module") -> list[str]:
        """Return why `model` cannot be wrapped, or what of it would not train."""
        from relora_ds.lowrank.problems import left_frozen
        from relora_ds.lowrank.targets import DEFAULT_TRAINABLE_MODULES, as_list, summary

        found = super().problems(model) or self._rank_problems(model)
        if not found and (names := left_frozen(model, self.relora)):
            experts = [name for name in names if model.get_parameter(name).ndim > 2]
            stacked = experts if self.takes_experts else []
            remedies = []
            if modules := dict.fromkeys(name.split(".")[-2] for name in names if name not in stacked):
                whole = as_list(self.relora.trainable_modules) or [*DEFAULT_TRAINABLE_MODULES]
                remedies.append(f"relora.trainable_modules=[{', '.join([*whole, *modules])}]")
            if leaves := dict.fromkeys(".".join(name.split(".")[-2:]) for name in stacked):
                remedies.append(
                    f"relora.target_parameters=[{', '.join([*as_list(self.relora.target_parameters), *leaves])}]"
                )
            found.append(
                f"relora.trainable_modules: {summary(names)} would be frozen for good, and method {self.name} trains "
                f"every weight; use {' '.join(remedies)}"
            )
        return found

    def _rank_problems(self, model: "nn.Module") -> list[str]:
        """Return a message if no weight has a subspace of the rank; where only some have, the others' is their side."""
        from relora_ds.lowrank.inventory import full_shape
        from relora_ds.lowrank.targets import find_targets

        if self.rank is None:
            return []
        shapes = {name: full_shape(weight)[-2:] for name, weight in find_targets(model, self.relora).weights.items()}
        name = max(shapes, key=lambda name: min(shapes[name]))
        if self.rank <= min(shapes[name]):
            return []
        return [
            f"relora.r: {self.rank} exceeds the smaller side of every weight, also of {name} "
            f"({'x'.join(map(str, shapes[name]))}); use relora.r <= {min(shapes[name])}"
        ]

    def recipe_warnings(self) -> Iterator[str]:
        """Yield what is for low-rank factors alone. As a warm start: nothing, the method after it may have factors."""
        if self.recipe.method != self.name:
            return
        relora, read = self.recipe.relora, (*_WHAT_AND_HOW, *(["r"] * self.has_rank))
        changed = {
            f"relora.{field.name}": getattr(relora, field.name)
            for field in dataclasses.fields(relora)
            if field.name not in read and getattr(relora, field.name) != field.default
        }
        if changed:
            values = ", ".join(f"{key}: {value}" for key, value in changed.items())
            has = "has" if len(changed) == 1 else "have"
            yield f"{values} {has} no effect with method {self.name}, which has no low-rank factors"

    def matrix_optimizers(self, model: "nn.Module") -> "Mapping[str, MatrixOptimizer]":
        """Return the rule of each wrapped layer of a prepared model, by name."""
        from relora_ds.lowrank.wrap import owned_layers

        return dict.fromkeys(owned_layers(model), self.rule())

    def rule(self) -> "MatrixOptimizer":
        """Return the rule of a linear's weight."""
        raise NotImplementedError

    def projected_adam(self) -> "ProjectedAdam":
        """Return Adam with the recipe's values, as rules have it that project."""
        from relora_ds.matrix.adam import ProjectedAdam

        optim = self.recipe.optim
        return ProjectedAdam(betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)

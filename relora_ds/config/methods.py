"""What a training method is, and the method that a recipe names.

Everything that is special to a method is in its file in relora_ds/methods: what the recipe's values mean to it, the
surgery on the model, the optimizer's groups, and what happens after a step. Nobody else compares names of methods; they
ask the method. A method's file needs no torch to be imported, so that a recipe is checked in milliseconds.
"""

import importlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from relora_ds.config import fields
from relora_ds.config.names import METHODS
from relora_ds.config.relora_config import ReLoRAConfig
from relora_ds.config.schema import Recipe
from relora_ds.config.switch_config import SwitchLoRAConfig


class Method:
    """A way to train a network. The defaults are those of training every weight from the first step to the last.

    Attributes:
        name: in recipes.
        sections: of the recipe, that this method alone reads.
        relora: the configuration of the wrapped layers; None for a model without any.
        has_base: whether frozen weights lie under the low-rank updates.
        is_chain: whether it merges its updates at restarts, so that another such method can continue from one.
        has_owners: whether owners of the wrapped layers' weights update them, from whole gradients.
        can_warm_start: whether another method can continue from the weights that it leaves.
        no_warm_start: why not, where it cannot.
        switching: how rows of A and columns of B are switched; None where they are not.
        defaults: recipe keys and the values that the method's name stands for.
    """

    name: str
    sections: tuple[str, ...] = ()
    relora: ReLoRAConfig | None = None
    has_base: bool = True
    is_chain: bool = False
    has_owners: bool = False
    can_warm_start: bool = True
    no_warm_start: str = "trains a network of another shape, whose weights method {method} cannot take over"
    switching: SwitchLoRAConfig | None = None
    defaults: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @classmethod
    def of_warm_start(cls, recipe: Recipe) -> "Method":
        """Return the method for the warm start of `recipe`, which names another method for the steps after it."""
        return cls(recipe)

    # What the recipe means. Its values may be wrong, each on its own, where problems are looked for.

    @property
    def is_low_rank(self) -> bool:
        """Whether there are low-rank factors."""
        return self.relora is not None and not self.has_owners

    @property
    def label(self) -> str:
        """The method as tables and figures call it."""
        return self.name

    @property
    def rank(self) -> int | None:
        """Of the low-rank updates, or of the subspace of a gradient; None without one."""
        return None if self.relora is None else self.relora.r

    @property
    def full_rank_steps(self) -> int:
        """Full-rank steps at the start of the run, or its warm start by another method; the rest is low-rank."""
        return self.recipe.total_steps

    @property
    def low_rank_steps(self) -> int:
        """`N` of the schedule: steps of the low-rank phase."""
        return self.recipe.total_steps - self.full_rank_steps

    @property
    def warm_start_steps(self) -> int:
        """Steps of the warm start before a low-rank phase; 0 where there is none of either."""
        return self.full_rank_steps if self.low_rank_steps else 0

    @property
    def num_restarts(self) -> int:
        """Scheduled restarts: the multiples of `restart_every` strictly inside (0, low_rank_steps)."""
        every = None if self.relora is None else self.relora.restart_every
        return 0 if every is None else max(0, self.low_rank_steps - 1) // every

    @property
    def speed_key(self) -> list:
        """What decides the method's speed on a given network: plain JSON, equal for equally fast recipes."""
        return [self.name]

    def recipe_problems(self) -> Iterator[str]:
        """Yield why the method cannot do what the recipe asks for."""
        yield from ()

    def recipe_warnings(self) -> Iterator[str]:
        """Yield what has no effect with the method, or not the expected one. Only for a recipe without problems."""
        yield from ()

    def deepspeed_problems(self, settings: dict[str, Any]) -> list[str]:
        """Return what of a DeepSpeed configuration the method does not work with."""
        return []

    # The model, an `nn.Module`, which has no values yet.

    def problems(self, model: Any) -> list[str]:
        """Return why the method cannot train `model` (on meta); asked before anything is built."""
        return []

    def warnings(self, model: Any) -> list[str]:
        """Return what training `model` (on meta) with this method leaves out; asked where there are no problems."""
        return []

    def prepare(self, model: Any) -> Any:
        """Do the surgery on the module tree, and return the model to train."""
        return model

    # Training.

    def param_groups(self, model: Any) -> list[dict]:
        """Return the optimizer's groups of a prepared model."""
        raise NotImplementedError

    def matrix_optimizers(self, model: Any) -> Mapping[str, Any] | None:
        """Return, for each layer of a prepared model whose owner updates it, the `MatrixOptimizer`; None without."""
        return None

    def after_step(self, engine: Any) -> None:
        """Do what follows an applied optimizer step, such as a restart. engine: a `ReLoRAEngine`. On every rank."""


def method_class(name: str) -> type[Method]:
    """Return the class of a method in `METHODS`."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def own_keys() -> list[str]:
    """Return the keys that some methods alone read: those of their `sections`."""
    sections = {section for name in METHODS for section in method_class(name).sections}
    return [key for key in fields.fields_of(Recipe) if key.partition(".")[0] in sections]


def method_of(recipe: Recipe) -> Method:
    """Return the method that a recipe names."""
    return method_class(recipe.method)(recipe)


def warm_start_of(recipe: Recipe) -> Method:
    """Return the method of the warm start, in a recipe that has one."""
    return method_class(recipe.warm_start_method).of_warm_start(recipe)


def methods_of(recipe: Recipe) -> list[Method]:
    """Return the methods of the run's phases, in order."""
    method = method_of(recipe)
    return [warm_start_of(recipe), method] if method.warm_start_steps else [method]


def full_rank(recipe: Recipe) -> Method:
    """Return ordinary training of every weight, which others are compared with."""
    return method_class("full")(recipe)

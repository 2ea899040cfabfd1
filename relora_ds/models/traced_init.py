"""What transformers' initialisation does to each parameter, found by running it without values.

`PreTrainedModel._init_weights(module)` is called for every module, from the leaves to the root, and may write to any
parameter below: a parent overrides what its children did. On the meta device this costs microseconds a parameter and
leaves a list of the calls that give it its value. Repeated on a single real parameter, they give this one alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS

# In-place operations whose result does not depend on what was there.
_FILLS = {
    "bernoulli_",
    "cauchy_",
    "copy_",
    "exponential_",
    "fill_",
    "geometric_",
    "log_normal_",
    "normal_",
    "random_",
    "uniform_",
    "zero_",
}


@dataclass(frozen=True)
class Call:
    """`model._init_weights(module)`."""

    model: PreTrainedModel
    module: nn.Module

    def repeat(self) -> None:
        self.model._init_weights(self.module)


@dataclass(frozen=True)
class Write:
    """One operation that changes a tensor.

    Attributes:
        fills: whether all of it gets a value that does not depend on what was there.
        inputs: the tensors, by the ids of their storages, that the new value depends on.
    """

    call: Call
    fills: bool
    inputs: frozenset[int]


class Trace(TorchDispatchMode):
    """Records the operations on tensors of the meta device. `writes_to` tells what happened to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self._call: Call | None = None
        self._writes: dict[int, list[Write]] = {}
        self._inputs: dict[int, frozenset[int]] = {}  # of intermediate results
        self._seen: dict[int, torch.UntypedStorage] = {}  # kept alive, or another one would get its id

    @contextmanager
    def of(self, call: Call) -> Iterator[None]:
        """Record what `call` does."""
        before, self._call = self._call, call
        try:
            with self:
                yield
        finally:
            self._call = before

    def calls(self, parameter: Tensor) -> list[Call]:
        """Return the calls that give a parameter its value, in order; none where it also comes from elsewhere."""
        last = self._last_writes(parameter)
        return [] if self.mixes(parameter) else list(dict.fromkeys(write.call for write in last))

    def mixes(self, parameter: Tensor) -> bool:
        """Return True if the value of a parameter depends on other tensors without values."""
        return any(write.inputs - {self._id(parameter)} for write in self._last_writes(parameter))

    def _last_writes(self, parameter: Tensor) -> list[Write]:
        """Return the writes that a parameter's value depends on; none where it is never filled."""
        own, writes = self._id(parameter), self._writes.get(self._id(parameter), [])
        fills = [number for number, write in enumerate(writes) if write.fills and own not in write.inputs]
        return writes[fills[-1] :] if fills else []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        schema, read, written = function._schema, [], []
        named = {**{a.name: value for a, value in zip(schema.arguments, args, strict=False)}, **kwargs}
        for argument in schema.arguments:
            changes = argument.alias_info is not None and argument.alias_info.is_write
            tensors = [leaf for leaf in tree_leaves(named.get(argument.name)) if _is_meta(leaf)]
            (written if changes else read).extend(tensors)
        self._record(function.__name__.split(".")[0], read, written, result)
        return result

    def _record(self, name: str, read: list[Tensor], written: list[Tensor], result) -> None:
        makes_new = name.startswith("new_") or name.endswith("_like")  # takes the shape and nothing else
        assert self._call is not None  # nothing is traced outside a call
        inputs = frozenset().union(*(self._origin(tensor) for tensor in ([] if makes_new else read)))
        for tensor in written:
            whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
            fills = whole and (name in _FILLS or not name.endswith("_"))  # without `_`: the one with `out=`
            self._writes.setdefault(self._id(tensor), []).append(Write(self._call, fills, inputs))
            if self._id(tensor) in self._inputs:
                self._inputs[self._id(tensor)] |= inputs
        known = {self._id(tensor) for tensor in (*read, *written)}  # a view is no result
        for tensor in filter(_is_meta, tree_leaves(result)):
            if self._id(tensor) not in known:
                self._inputs[self._id(tensor)] = inputs

    def _origin(self, tensor: Tensor) -> frozenset[int]:
        own = self._id(tensor)
        return self._inputs.get(own, frozenset([own]))

    def _id(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._seen.setdefault(storage._cdata, storage)
        return storage._cdata


def _is_meta(value) -> bool:
    return isinstance(value, Tensor) and value.is_meta


@contextmanager
def traced_init() -> Iterator[Trace]:
    """Trace the initialisation of all models of transformers' own that are built meanwhile."""
    trace, initialize = Trace(), PreTrainedModel._initialize_weights
    functions: dict[str, Any] = dict(TORCH_INIT_FUNCTIONS)

    def traced(model: PreTrainedModel, module: nn.Module, *args) -> None:
        with trace.of(Call(model, module)):
            initialize(model, module, *args)

    PreTrainedModel._initialize_weights = traced  # type: ignore[method-assign, assignment]  # put back below
    TORCH_INIT_FUNCTIONS.update({name: _filling(function) for name, function in functions.items()})
    try:
        yield trace
    finally:
        PreTrainedModel._initialize_weights = initialize  # type: ignore[method-assign]
        TORCH_INIT_FUNCTIONS.update(functions)


def _filling(function: Callable) -> Callable[..., Tensor]:
    """Return a function of `torch.nn.init`, each of which fills a tensor; some do nothing on the meta device."""

    def fill(tensor: Tensor, *args, **kwargs) -> Tensor:
        return tensor.zero_() if tensor.is_meta else function(tensor, *args, **kwargs)

    return fill

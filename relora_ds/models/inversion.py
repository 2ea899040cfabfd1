"""CR-Net's activation checkpointing: a layer keeps its input and the products A·x, and backward finds its Y_{l-1}.

Backward comes to layer l when it has been in layer l + 1, which has found Y_l there, and repeats the layer with

    Y_{l-1} = (Y_l - B·A·x) / f(β_l)

Each division adds a rounding error of ε / |f(β)|, so it is in fp32, in which a CR-Net carries its Y, and a chain of
divisions is short: Y_{l-1} is kept in the last layer, in every eighth, and where the chain's errors would have grown
by more than `MAX_GROWTH`. This takes the value of every β in forward, for which the device is waited for. The authors
keep Y_L; Y_{L-1} is as large and needs one division less.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from relora_ds.architectures import ReLoRACRNetForCausalLM

EVERY = 8  # layers
MAX_GROWTH = 16.0  # of rounding errors: to about 1e-6 of Y


def invert(after: Tensor, change: Tensor, factor: Tensor) -> Tensor:
    """Return `Y_{l-1}` for Y_l, B·A·x and f(β); all in fp32 or wider."""
    return (after - change) / factor


def apply(model: ReLoRACRNetForCausalLM) -> None:
    """Let the layers of a model, which already checkpoint, pass each other what they have found."""
    chain = _Chain(model.config.num_hidden_layers, model.config.crnet_beta)
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = partial(_run, chain, layer._gradient_checkpointing_func)


def _run(chain: "_Chain", checkpoint: Callable[..., Any], layer: Callable[..., Any], states: Any) -> Any:
    if isinstance(states, Tensor):  # the first layer's: there is no Y before it
        chain.begin()
        return checkpoint(layer, states)
    hidden_states, before = states
    links = chain.add(before)
    return checkpoint(lambda hidden_states: layer((hidden_states, links)), hidden_states)


class _Chain:
    """The links of one forward, from layer to layer."""

    def __init__(self, num_layers: int, first_beta: float):
        self._num_layers, self._first_beta = num_layers, first_beta
        self.begin()

    def begin(self) -> None:
        self._layer, self._newest = 0, [_Link(None, self._first_beta)] * 7

    def add(self, before: Sequence[Tensor]) -> "list[_Link]":
        """Return the links of the next layer, whose Y_{l-1} are `before`."""
        self._layer += 1
        is_last = self._layer == self._num_layers - 1
        is_kept = is_last or self._layer % EVERY == 0
        links = [_Link(y, self._first_beta, is_kept) for y in before]
        for below, link in zip(self._newest, links, strict=True):
            below.after, link.growth = link, below.growth
        self._newest = links
        if is_last:
            self.begin()  # holds no Y from here on
        return links


class _Link:
    """A linear's Y_{l-1}, as the linear asks for it: given in forward, kept or found in a repetition.

    Attributes:
        after: the link of the next layer's linear at the same place, whose Y_{l-1} is this one's Y_l.
        growth: of errors, from the last Y that is kept to here.
    """

    def __init__(self, before: Tensor | None, first_beta: float, is_kept: bool = False):
        self.after: _Link | None = None
        self.growth = 1.0
        self._given, self._first_beta, self._is_kept = before, first_beta, is_kept
        self._held: Tensor | None = None

    def __call__(self, change: Tensor, factor: Tensor) -> Tensor:
        """Return Y_{l-1}. change: B·A·x. factor: f(β)."""
        if self._given is not None:
            given, self._given = self._given, None
            self.growth = max(self.growth, 1.0) / abs(self._value(factor))
            if self._is_kept or self.growth > MAX_GROWTH:
                self._is_kept, self.growth, self._held = True, 1.0, given.detach()
            return given
        after = None if self.after is None else self.after.take()
        if not self._is_kept:
            assert after is not None, "the last layer's is kept"
            with torch.no_grad():
                self._held = invert(after, change, factor)
        assert self._held is not None
        return self._held.detach().requires_grad_()

    def take(self) -> Tensor:
        """Return what was kept or found here, which the layer below is the last to need."""
        assert self._held is not None, "backward repeats the layers from the last to the first"
        held = self._held
        if not self._is_kept:
            self._held = None
        return held

    def _value(self, factor: Tensor) -> float:
        return self._first_beta if isinstance(factor, FakeTensor) else factor.item()

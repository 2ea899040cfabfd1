"""What a rule is whose factors are the weight: what trains of them is small enough to travel in place of gradients."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from relora_ds.matrix.optimizer import MatrixOptimizer, State


class FactoredOptimizer(MatrixOptimizer):
    """A rule of weights that are products of factors, which nothing else changes.

    Of a gradient of W it needs a projection alone, and what it changes is as small. So every rank can hold the factors
    and form W, while the owner of W has the rest of the state. `update` does all of it at once.

    Attributes:
        shared: what of a state all ranks hold: the factors, and what says which part of them trains.
    """

    takes_experts: ClassVar[bool] = False
    takes_weight_decay: ClassVar[bool] = False
    shared: ClassVar[tuple[str, ...]]

    @abstractmethod
    def begins_factors(self, state: State) -> bool:
        """Return whether W is decomposed, the first time or again, before the coming step."""

    @abstractmethod
    def decompose(self, state: State, weight: Tensor | None) -> None:
        """Give W other factors. weight: W before the first step; from then on the factors say what it is."""

    @abstractmethod
    def begin_step(self, state: State, key: str) -> None:
        """Choose what trains from the coming step on, where that changes. Decompose before."""

    @abstractmethod
    def project(self, gradient: Tensor, state: State) -> Tensor:
        """Return the gradients of what trains, 1-D: linear in that of W."""

    @abstractmethod
    def train(self, projected: Tensor, state: State, lr: float) -> None:
        """Take a step with what trains, and count it. It uses the gradients up."""

    @abstractmethod
    def changed(self, state: State) -> Tensor:
        """Return what a step has changed of the factors, 1-D, as long as the projected gradients."""

    @abstractmethod
    def follow(self, changed: Tensor, state: State) -> None:
        """Take what a step elsewhere has changed of the factors, and count it."""

    @abstractmethod
    def product(self, state: State) -> Tensor:
        """Return W as the factors have it, a new tensor."""

    def _change(
        self, gradient: Tensor, has_gradient: Tensor, state: State, lr: float, key: str, weight: Tensor | None
    ) -> Tensor:
        assert weight is not None
        if not has_gradient:
            return torch.zeros_like(gradient)
        if self.begins_factors(state):
            self.decompose(state, weight)
        self.begin_step(state, key)
        self.train(self.project(gradient, state), state, lr)
        return self.product(state).sub_(weight)

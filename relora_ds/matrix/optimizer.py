"""What an update rule is, and what all of them have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from relora_ds.config import fields
from relora_ds.lowrank.precision import exact_products

State = dict[str, Tensor]  # of one weight: fp32 or indices on its device; counts are 0-dim int64 tensors on the CPU


class MatrixOptimizer(ABC):
    """An update rule. What it must remember of a weight is in the state of that weight.

    Leading dimensions of a weight are experts, each a matrix of its own. A matrix whose gradient has a norm of 0, as
    that of an expert without tokens, or one that is not finite, gets the update 0, and its part of the state stays as
    it is. Counts advance nevertheless: the experts of a weight share them.

    Its settings are the fields of a dataclass, with the rules of a recipe's; ValueError names those that are wrong.

    Attributes:
        decays_first: weight decay, by `1 - lr · weight_decay`, comes before the update, as in torch's AdamW; else after
            it, and acts on the updated W.
        takes_experts: weights may have leading dimensions.
        takes_weight_decay: something else may change W too.
    """

    decays_first: ClassVar[bool] = False
    takes_experts: ClassVar[bool] = True
    takes_weight_decay: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = fields.fields_of(type(self), f"{type(self).__name__}.")
        found = [
            field.problem(fields.value_of(self, key.partition(".")[2]))
            for key, field in known.items()
            if field.rules or field.choices
        ]
        if wrong := [*filter(None, found)]:
            raise ValueError("\n".join(wrong))

    @abstractmethod
    def begin(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """Return the state of a weight `[..., out, in]` before its first update. dtype: that of its gradients."""

    def kept_bytes(self, shape: Sequence[int]) -> int:
        """Return what is kept on the device of a weight's owner beside its state, and is in no checkpoint."""
        return 0

    @torch.no_grad()
    def update(self, gradient: Tensor, state: State, lr: float, key: str, weight: Tensor | None = None) -> Tensor:
        """Return what to add to W, a new tensor `[..., out, in]`; change `state` in place.

        Args:
            gradient: `[..., out, in]`, fp32 or fp64; it stays as it is.
            key: of the weight. It decides what is random: equal keys give equal updates in every process.
            weight: W, for rules of its factors; it stays as it is.
        """
        norm = torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True)
        has_gradient = (norm > 0) & (norm < torch.inf)
        with exact_products():
            change = self._change(gradient, has_gradient, state, lr, key, weight)
        return change.masked_fill_(~has_gradient, 0.0)

    def _change(
        self, gradient: Tensor, has_gradient: Tensor, state: State, lr: float, key: str, weight: Tensor | None
    ) -> Tensor:
        """Return what to add to W, a new tensor. A rule defines this, or `_step`, which has what both say."""
        return self._step(gradient, has_gradient, state, key).mul_(-lr)

    def _step(self, gradient: Tensor, has_gradient: Tensor, state: State, key: str) -> Tensor:
        """Return what to subtract from W at a learning rate of 1, a new tensor; change `state` in place.

        Of a matrix without a gradient it may be anything, also NaN, but the state keeps its values.

        has_gradient: `[..., 1, 1]`, bool.
        """
        raise NotImplementedError


def average_in(value: Tensor, mean: Tensor, decay: float, has_gradient: Tensor) -> Tensor:
    """Move a running mean to `decay · mean + (1 - decay) · value`, in its place, and return it.

    Where there is no gradient it stays as it is. has_gradient: see `MatrixOptimizer._step`.
    """
    return mean.lerp_(value.masked_fill(~has_gradient, 0.0), has_gradient.to(mean.dtype) * (1 - decay))

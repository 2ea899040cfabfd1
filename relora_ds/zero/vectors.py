"""Rows and columns of matrices that ZeRO has cut into pieces, and AdamW with a step count for each of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from relora_ds.lowrank.vector_adam import update_, vector_steps
from relora_ds.zero.shards import ShardView

CHUNK = 1 << 22  # elements that are updated at a time
COPIES = 5  # fp32 tensors of their size that are alive meanwhile


@dataclass(frozen=True)
class Vector:
    """`length` elements of a flattened tensor, `stride` apart, from element `first` on."""

    first: int
    stride: int
    length: int

    def within(self, piece: Tensor, start: int) -> tuple[Tensor, slice]:
        """Return what a 1-D piece from element `start` on has of it, a view, and which of its elements these are."""
        stop = start + piece.numel()
        low = max(0, -((self.first - start) // self.stride))
        high = min(self.length, -((self.first - stop) // self.stride))
        if low >= high:
            return piece[:0], slice(0, 0)
        begin = self.first + low * self.stride - start
        return piece[begin : begin + (high - low - 1) * self.stride + 1 : self.stride], slice(low, high)


def row(index: int, shape: torch.Size) -> Vector:
    """Return a row of a matrix."""
    return Vector(index * shape[1], 1, shape[1])


def column(index: int, shape: torch.Size) -> Vector:
    """Return a column of a matrix."""
    return Vector(index, shape[1], shape[0])


def read_vectors(shards: ShardView, name: str, vectors: Iterable[Vector], into: Tensor) -> None:
    """Fill a row of `into` with what this rank has of the master of each vector."""
    shard = shards[name]
    for vector, value in zip(vectors, into, strict=True):
        piece, at = vector.within(shard.master, shard.start)
        value[at] = piece


def write_vectors(shards: ShardView, name: str, vectors: Iterable[Vector], values: Tensor) -> None:
    """Set vectors to the rows of `values`, which every rank holds: the master, and the copy that forward reads."""
    shard, (copy, start) = shards[name], shards.forward_copy(name)
    for vector, value in zip(vectors, values, strict=True):
        for whole, first in ((shard.master, shard.start), (copy, start)):
            piece, at = vector.within(whole, first)
            piece.copy_(value[at])


class VectorAdamW(torch.optim.AdamW):
    """AdamW in which the vectors of some tensors have step counts of their own (`lowrank.vector_adam`).

    It is the optimizer that DeepSpeed wraps. So the counts act on this rank's shards before DeepSpeed publishes them,
    and nothing is sent or corrected afterwards. The common count of a tensor is kept as torch's AdamW keeps it.
    """

    def __init__(self, groups: list[dict], **values):
        super().__init__(groups, **values)
        self._of: dict[int, Tensor] = {}

    def count_by_vector(self, of: Iterable[tuple[Tensor, Tensor]], resets: Tensor, freeze_steps: int) -> None:
        """Step these tensors by vector from now on.

        Args:
            of: tensors that are stepped, and the number of the vector that each of their elements belongs to, int32.
            resets: of each vector, Adam's step count when it was reset, int64; 0: never. It is read at every step.
            freeze_steps: see `vector_steps`.
        """
        self._of = {id(flat): numbers for flat, numbers in of}
        self._resets, self._freeze_steps = resets, freeze_steps

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step, as torch's AdamW does."""
        assert closure is None
        held = [(group, group["params"]) for group in self.param_groups]
        for group, params in held:
            group["params"] = [p for p in params if id(p) not in self._of]
        try:
            super().step()
        finally:
            for group, params in held:
                group["params"] = params
        for group, params in held:
            for p in params:
                if id(p) in self._of and p.grad is not None:
                    self._step_vectors(p, p.grad, group)

    def _step_vectors(self, p: Tensor, gradient: Tensor, group: dict) -> None:
        assert group["weight_decay"] == 0
        state, betas = self.state[p], group["betas"]
        state["step"] += 1
        steps = vector_steps(
            state["step"], self._resets, freeze_steps=self._freeze_steps, lr=float(group["lr"]), betas=betas
        )
        flats = (p, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"], self._of[id(p)])
        for values, g, m, v, of in zip(*(flat.view(-1).split(CHUNK) for flat in flats), strict=True):
            update_(values, g, m, v, of, steps, betas=betas, eps=group["eps"])

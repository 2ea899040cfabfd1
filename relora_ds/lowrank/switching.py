"""SwitchLoRA (arXiv 2406.06564): rows of A and columns of B take turns with candidates, and the function stays.

A layer computes `W·x + s·B·A·x`, with `s = 1/r`. At every step a few rows of A and columns of B change places with
candidates of the same size, one after the other, and W takes what the product loses:

    a_i <- a'       W += s · b_i · (a_i - a')ᵀ
    b_j <- b'       W += s · (b_j - b') · a_jᵀ

The gradient of a_i depends on b_i alone, so Adam keeps its moments; those of b_i belong to the old a_i and begin again
(`lowrank.vector_adam`). How many are switched falls over the run. It depends on the seed, the step and the name of the
layer, so that all ranks know it without being told.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relora_ds.lowrank.precision import exact_products
from relora_ds.lowrank.seeding import keyed_generator, keyed_seed

_GAIN = (1 / 3) ** 0.25
_FALL = 0.3  # how often vectors are switched after `ratio` of the run, as a part of how often at its start


def factor_stds(out_features: int, in_features: int, r: int) -> tuple[float, float]:
    """Return the standard deviations of the entries of A and of B, and of their candidates."""
    m, n = out_features, in_features
    return (math.sqrt(m) * r / n**1.5) ** 0.25 * _GAIN, (r / math.sqrt(m * n)) ** 0.25 * _GAIN


def drawn(rows: int, columns: int, std: float, key: str) -> Tensor:
    """Return a uniform matrix of this standard deviation around 0, fp32 `[rows, columns]` on the CPU."""
    bound = math.sqrt(3) * std
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=keyed_generator(key))


def interval(t: int, total_steps: int, *, first: float = 40, ratio: float = 0.1) -> float:
    """Return the steps in which each vector is switched once.

    Args:
        t: steps taken.
        first: at the start of the run.
        ratio: the part of the run after which it is `1 / 0.3` times as long.
    """
    return first * _FALL ** (-(t + 1) / (ratio * total_steps))


def num_switched(expected: float, key: str) -> int:
    """Return `expected` rounded at random, without bias. key: decides."""
    whole = math.floor(expected)
    return whole + (keyed_seed(key) / 2**63 < expected - whole)


@dataclass(frozen=True)
class Turn:
    """What is switched of a layer at a step: indices in A and B, and of the candidates that take their places."""

    rows: list[int]
    columns: list[int]
    new_rows: list[int]
    new_columns: list[int]

    @property
    def pairs(self) -> list[int]:
        """The indices of which a row of A and a column of B are needed."""
        return sorted({*self.rows, *self.columns})


def turn_of(r: int, candidates: int, counts: tuple[int, int], expected: float, key: str) -> Turn:
    """Return what is switched of a layer of rank `r`: windows that follow those before them, B's half a circle ahead.

    Args:
        candidates: for A, and for B; at least `r`.
        counts: rows of A and columns of B that were switched so far.
        expected: how many to switch of each on average; below `r`.
        key: decides what they are rounded to.
    """
    (from_A, from_B), (of_A, of_B) = counts, (num_switched(expected, f"{key}/{factor}") for factor in "AB")
    return Turn(
        window(from_A, of_A, r),
        window(r // 2 + from_B, of_B, r),
        window(from_A, of_A, candidates),
        window(from_B, of_B, candidates),
    )


def window(start: int, count: int, size: int) -> list[int]:
    """Return `count` indices below `size` from `start` on, which follow each other in a circle."""
    return [(start + i) % size for i in range(count)]


def switch_(
    lora_A: Tensor,
    lora_B: Tensor,
    rows: Sequence[int],
    new_rows: Tensor,
    columns: Sequence[int],
    new_columns: Tensor,
) -> tuple[Tensor, Tensor]:
    """Replace rows of A, then columns of B, in place.

    Args:
        lora_A, lora_B: `[r, in]` and `[out, r]`, or the same rows and columns of them.
        rows, columns: indices, none of them twice.
        new_rows, new_columns: `[len(rows), in]` and `[out, len(columns)]`.

    Returns:
        `(down, up)`, `[k, in]` and `[out, k]`: with `s · up · down` added to W, the function is what it was.
    """
    at_rows, at_columns = (torch.tensor(at, dtype=torch.int64, device=lora_A.device) for at in (rows, columns))
    down_A, up_A = lora_A[at_rows] - new_rows, lora_B[:, at_rows]
    lora_A[at_rows] = new_rows
    down_B, up_B = lora_A[at_columns], lora_B[:, at_columns] - new_columns
    lora_B[:, at_columns] = new_columns
    return torch.cat([down_A, down_B]), torch.cat([up_A, up_B], dim=1)


def add_part_(weight: Tensor, start: int, columns: int, first: Tensor, second: Tensor, alpha: float) -> None:
    """Add the elements that a flat piece of a matrix has of `alpha · first · second`, in place.

    Args:
        weight: 1-D, fp32: the elements from `start` on of a matrix with so many `columns`.
        first, second: `[rows, k]` and `[k, columns]`.
    """
    if not weight.numel():
        return
    top, bottom = start // columns, -(-(start + weight.numel()) // columns)
    with exact_products():
        if start % columns == 0 and weight.numel() % columns == 0:
            weight.view(-1, columns).addmm_(first[top:bottom], second, alpha=alpha)
        else:
            change = (first[top:bottom] @ second).view(-1)[start - top * columns :][: weight.numel()]
            weight.add_(change, alpha=alpha)

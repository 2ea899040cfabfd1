"""Where the subspace of a cycle comes from: what `lora_A` becomes at a restart (`relora.restart_init`).

The paper draws A anew from Kaiming's distribution, without a look at what came before. Two others:

    random      an orthonormal basis of a random subspace
    gradient    a basis of the dominant row space of W's full gradient, as GaLore (arXiv 2403.03507) chooses its
                subspace. The last step of a cycle takes along what it is computed from, so there is no extra backward:
                a sketch of the gradient of every W, or the gradients themselves

A one-sided chain (`relora.trains: B`) needs rows of length 1. Where both factors train, rows have the length that
Kaiming's have on average, so that learning rates mean the same.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from relora_ds.lowrank.precision import exact_products
from relora_ds.lowrank.seeding import keyed_generator

ROW_NORM = math.sqrt(1 / 3)  # of Kaiming-uniform rows with a=√5, whose entries have the variance 1 / (3 · in)
OVERSAMPLED = 8  # rows of a sketch beyond r (Halko, Martinsson and Tropp, arXiv 0909.4061, recommend 5 to 10)


def random_basis(shape: torch.Size, key: str) -> Tensor:
    """Return a random orthonormal basis `[..., r, in]`, fp32 on the CPU; equal on equal processors for equal keys."""
    gaussian = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=keyed_generator(key))
    return torch.linalg.qr(gaussian).Q.mT.contiguous()


def warm_rows(moment: Tensor, key: str) -> Tensor:
    """Return `Ω` of a warm-started sketch: `[r + OVERSAMPLED, out]`, fp32.

    An orthonormal basis of the columns of B's first moment, which average the gradient over many steps, and fresh
    random rows, without which the subspace could not leave where it is. So the sketch is a step of subspace iteration
    from cycle to cycle, as PowerSGD (arXiv 1905.13727) and LDAdam (arXiv 2410.16103) make it at every step.

    Args:
        moment: B's `exp_avg`, `[out, r]`.
        key: of the random rows.
    """
    out_features = moment.shape[0]
    fresh = torch.randn(OVERSAMPLED, out_features, generator=keyed_generator(key)).to(moment.device)
    basis = torch.linalg.qr(moment).Q.t()
    return torch.cat([basis * math.sqrt(out_features), fresh])


class GradientTap(Protocol):
    """What a layer's backward tells of the gradient of W (`LowRankLayer.sketch`)."""

    def add(self, g: Tensor, rows: Tensor) -> None:
        """Add one backward, `gᵀ·rows`. g: `[n, out]`; rows: `[n, in]`, the layer's input."""


class GradientSketch:
    """`Ω·G`, `[rows, in]` in fp32, of the gradient `G = gᵀ·x` of a layer's W, over micro-batches.

    Costs what the gradients of a low-rank pair cost; `G` itself is never there.

    Args:
        omega: `[rows, out]`, fp32, on `device`; None for `r + OVERSAMPLED` random rows, which are drawn from `key`.
    """

    def __init__(
        self,
        r: int,
        in_features: int,
        key: str,
        device: torch.device | str = "cpu",
        omega: Tensor | None = None,
    ):
        self._key, self._omega = key, omega
        self.values = torch.zeros(sketch_shape(r, in_features), device=device)

    def add(self, g: Tensor, rows: Tensor) -> None:
        if self._omega is None:
            omega = torch.randn(len(self.values), g.shape[1], generator=keyed_generator(self._key))
            self._omega = omega.to(g.device)
        with exact_products():
            self.values.addmm_(self._omega @ g.float().t(), rows.float())


def sketch_shape(r: int, in_features: int) -> torch.Size:
    """Return the shape of a layer's `GradientSketch.values`."""
    return torch.Size((r + OVERSAMPLED, in_features))


def dominant_rows(gradient: Tensor, r: int) -> Tensor | None:
    """Return an orthonormal basis `[r, in]` of the dominant row space, fp32 on the CPU; None where there is none.

    In each row the largest entry by magnitude is positive: moments that a chain carries over belong to signed
    coordinates, and decompositions choose signs as they like.

    gradient: `[rows, in]`, or a sketch of it, with at least `r` rows.
    """
    if not torch.isfinite(gradient).all() or not gradient.any():
        return None
    basis = torch.linalg.svd(gradient.float(), full_matrices=False).Vh[:r]
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return (basis * largest.sign()).cpu().contiguous()

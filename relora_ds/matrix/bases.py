"""Projections of a gradient onto r coordinates, always along its shorter side.

`R = G·Qᵀ` where a weight has at least as many outputs as inputs, else `R = Pᵀ·G`. The second is the first of the
transposed gradient with `Q = Pᵀ`, so that the rules know one form: `tall(G)`, and a basis `[..., r, shorter side]`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from relora_ds.lowrank.seeding import keyed_generator

EPS = 1e-8  # added to norms that something is divided by


def tall(matrices: Tensor) -> Tensor:
    """Return `[..., out, in]` as a view `[..., longer, shorter side]`: itself where it is square."""
    return matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT


def like(shape: Sequence[int], matrices: Tensor) -> Tensor:
    """Return what is in the form of `tall` as a view in the form `[..., out, in]` of `shape`."""
    return matrices if shape[-2] >= shape[-1] else matrices.mT


def projected_shape(shape: Sequence[int], r: int) -> list[int]:
    """Return the shape of R for gradients of `shape`."""
    return [*shape[:-2], max(shape[-2:]), r]


def norm_ratios(normalized: Tensor, projected: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Return `‖N‖ / (‖R‖ + EPS)` over `dim`, which is kept: how much longer Adam makes a gradient."""
    of_normalized, of_projected = (
        torch.linalg.vector_norm(each, dim=dim, keepdim=True) for each in (normalized, projected)
    )
    return of_normalized / of_projected.add_(EPS)


def unit_basis(shape: Sequence[int], r: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Return the first r unit vectors as a basis for gradients of `shape`. r: at most the shorter side."""
    return torch.eye(r, min(shape[-2:]), device=device, dtype=dtype).repeat(*shape[:-2], 1, 1)


def dominant_basis(gradient: Tensor, r: int) -> Tensor | None:
    """Return an orthonormal basis of the r dominant singular vectors; None where the decomposition does not converge.

    Signs: with `G = U·S·Vᵀ` the largest entry by magnitude of every column of U is positive, and V follows. Moments
    that are carried from basis to basis belong to signed coordinates, and decompositions choose signs as they like.

    gradient: `[..., out, in]`, finite, of any rank, 0 too.
    """
    try:
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    except torch.linalg.LinAlgError:
        return None
    signs = column_signs(left)
    of_shorter = right * signs.mT if gradient.shape[-2] >= gradient.shape[-1] else (left * signs).mT
    return of_shorter[..., :r, :]


def column_signs(columns: Tensor) -> Tensor:
    """Return the sign of the entry of the largest magnitude in each column, `[..., 1, columns]`."""
    return columns.gather(-2, columns.abs().argmax(-2, keepdim=True)).sign()


def random_projection(shape: Sequence[int], r: int, key: str) -> Tensor:
    """Return `[r, shorter side]`, fp32 on the CPU: normal draws of the variance 1/r, the same for equal keys.

    The experts of a weight share it. shape: of the gradients.
    """
    return torch.randn(r, min(shape[-2:]), generator=keyed_generator(key)).div_(math.sqrt(r))

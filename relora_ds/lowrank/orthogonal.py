"""Orthogonalised gradients, as Muon (Jordan et al., 2024) makes them, and the update of a weight by one of them.

With `G = U·S·Vᵀ` the update is `U·Vᵀ`, nearly: a few steps of a Newton-Schulz iteration bring all singular values near
1, by products alone. Its size is known, whatever the size of G.
"""

import math

import torch
from torch import Tensor

from relora_ds.lowrank.precision import exact_products

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(gradient: Tensor, products: torch.dtype | None = None) -> Tensor:
    """Return `U·Vᵀ` of `gradient = U·S·Vᵀ`, nearly: a new tensor `[..., out, in]`; 0 where the gradient is 0.

    Singular values end between 0.7 and 1.2, but for those far below the largest.

    Args:
        gradient: `[..., out, in]`, of a floating dtype.
        products: what they are computed in; None: that dtype.
    """
    is_tall = gradient.shape[-2] > gradient.shape[-1]
    matrices = gradient.reshape(-1, *gradient.shape[-2:])
    x = matrices.mT if is_tall else matrices
    # Squares of what is smaller than this are not precise, or 0.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(math.sqrt(torch.finfo(x.dtype).tiny))
    x, (first, third, fifth) = x.to(products or x.dtype), COEFFICIENTS
    with exact_products():
        for _ in range(ITERATIONS):
            square = x @ x.mT
            polynomial = torch.baddbmm(square, square, square, beta=third, alpha=fifth)
            x = torch.baddbmm(x, polynomial, x, beta=first)
    return (x.mT if is_tall else x).reshape(gradient.shape).to(gradient.dtype)


def orthogonal_update(gradient: Tensor, lr: float) -> Tensor:
    """Return what to add to a weight: `-lr · √max(1, out/in) · U·Vᵀ`, a new tensor. gradient: see `orthogonalized`."""
    rows, columns = gradient.shape[-2:]
    return orthogonalized(gradient).mul_(-lr * math.sqrt(max(1.0, rows / columns)))

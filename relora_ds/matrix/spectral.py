"""Spectral factors of a weight, and what Sparse Spectral Training (arXiv 2405.15481) does with them.

    W = U·diag(σ)·Vᵀ        U [out, p], σ [p], V [in, p], p = min(out, in): all of W

With the gradient G of W, that of σ_i is `u_iᵀ·G·v_i`. Those of u_i and v_i are `σ_i·G·v_i` and `σ_i·Gᵀ·u_i`; SST leaves
σ_i out of them (its *enhanced* gradients), so that directions of small σ move as fast as those of large ones.
"""

import torch
from torch import Tensor

from relora_ds.lowrank.seeding import keyed_generator
from relora_ds.matrix.bases import column_signs


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, σ and V of a finite matrix `[out, in]`, σ falling.

    Signs: in every column of U the entry of the largest magnitude is positive, and V follows.
    """
    try:
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    except torch.linalg.LinAlgError:  # it did not converge
        precise = torch.linalg.svd(weight.to("cpu", torch.float64), full_matrices=False)
        left, sigma, right = (factor.to(weight) for factor in precise)
    signs = column_signs(left)
    return left.mul_(signs), sigma, right.mT.mul_(signs)


def product(left: Tensor, sigma: Tensor, right: Tensor) -> Tensor:
    """Return `U·diag(σ)·Vᵀ`, a new tensor `[out, in]`."""
    return (left * sigma) @ right.mT


def probabilities(sigma: Tensor) -> Tensor:
    """Return with which probability each triplet is drawn first: the mean of 1/p and of σ's share. sigma: `[p]`."""
    uniform, total = 1 / sigma.numel(), sigma.sum()
    return (sigma / total + uniform) / 2 if total > 0 else torch.full_like(sigma, uniform)


def sample(sigma: Tensor, r: int, key: str) -> Tensor:
    """Return the indices of r triplets, ascending, int64 `[r]` on the CPU: drawn without replacement.

    key: decides, beside σ.
    """
    chances = probabilities(sigma.to("cpu", torch.float64))
    return torch.multinomial(chances, r, generator=keyed_generator(key)).sort().values


def enhanced_gradients(gradient: Tensor, left: Tensor, right: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the sampled columns of U and of V, without σ, and that of all of σ.

    Args:
        gradient: of W, `[out, in]`.
        left, right: U and V.
        sampled: indices `[r]`.

    Returns:
        `[out, r]`, `[in, r]` and `[p]`.
    """
    images = gradient @ right
    of_left, of_right = images.index_select(1, sampled), gradient.mT @ left.index_select(1, sampled)
    return of_left, of_right, images.mul_(left).sum(0)


def normalize_columns_(columns: Tensor) -> Tensor:
    """Give columns the length 1, in place, and return them; one of length 0 stays."""
    lengths = torch.linalg.vector_norm(columns, dim=0)
    return columns.div_(lengths.masked_fill_(lengths == 0, 1.0))

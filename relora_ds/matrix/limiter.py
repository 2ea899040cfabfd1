"""The norm-growth limiter of Fira (arXiv 2410.01623), which APOLLO has too: no update is much longer than the last."""

from collections.abc import Sequence

import torch
from torch import Tensor

from relora_ds.matrix.bases import EPS
from relora_ds.matrix.optimizer import State

GROWTH = 1.01  # per update


def begin(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> State:
    """Return the state before the first update: `norm`, `[..., 1, 1]`, 0 where there was no update yet."""
    return {"norm": torch.zeros(*shape[:-2], 1, 1, device=device, dtype=dtype)}


def limit_growth(update: Tensor, has_gradient: Tensor, state: State) -> Tensor:
    """Shorten each matrix of an update, in its place, to `GROWTH` times the norm of the one before, and return it.

    The norm before is that of the limited update, so that a spike does not let the next one pass.

    has_gradient: see `MatrixOptimizer._step`.
    """
    before = state["norm"]
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    limited = torch.where(before > 0, torch.minimum(norm, GROWTH * (before + EPS)), norm)
    before.copy_(torch.where(has_gradient, limited, before))
    return update.mul_(limited / norm.clamp_min(torch.finfo(norm.dtype).tiny))

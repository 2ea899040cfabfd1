"""What `lora_A` becomes at a restart, where it is not Kaiming noise (`relora.restart_init`).

Beyond the paper, whose A is drawn anew without a look at what came before:

    orthogonal  the A's of successive cycles start in subspaces that are orthogonal to each other: blocks of rows of one
                random orthogonal matrix per layer
    gradient    A starts in the dominant row space of W's full gradient, as GaLore (arXiv 2403.03507) chooses its
                subspace; found in a sketch that the last step of a cycle takes along, so there is no extra backward

All rows have the norm that Kaiming's have on average, so that learning rates mean the same.
"""

import math

import torch
from torch import Tensor

from relora_ds.lowrank.precision import exact_products
from relora_ds.lowrank.seeding import keyed_generator

ROW_NORM = math.sqrt(1 / 3)  # of Kaiming-uniform rows with a=√5, whose entries have the variance 1 / (3 · in)
OVERSAMPLED = 8  # rows of a sketch beyond r (Halko, Martinsson and Tropp, arXiv 0909.4061, recommend 5 to 10)


def orthogonal_A(r: int, in_features: int, *, seed: int, restart: int, name: str) -> Tensor:
    """`[r, in_features]`, fp32 on the CPU: the rows of cycle `restart` (0 = before the first restart).

    Once the subspaces of `in_features // r` cycles have filled the space, another matrix begins. Needs no state: the
    matrix is known by (seed, name).
    """
    cycles = max(1, in_features // r)
    generator = keyed_generator(f"{seed}/{restart // cycles}/{name}/orthogonal")
    # Only as many of the matrix's columns as there have been cycles; later ones do not change the earlier.
    random = torch.randn(in_features, cycles * r, generator=generator)[:, : (restart % cycles + 1) * r]
    return torch.linalg.qr(random).Q[:, -r:].t().contiguous().mul_(ROW_NORM)


class GradientSketch:
    """`Ω·G`, `[r + OVERSAMPLED, in]` in fp32, of the gradient `G = gᵀ·x` of a layer's W, over micro-batches.

    Costs what the gradients of a low-rank pair cost; `G` itself is never there.
    """

    def __init__(self, r: int, in_features: int, key: str, device: torch.device | str = "cpu"):
        self._key = key
        self._omega: Tensor | None = None
        self.values = torch.zeros(r + OVERSAMPLED, in_features, device=device)

    def add(self, g: Tensor, rows: Tensor) -> None:
        """Add one backward. g: `[n, out]`; rows: `[n, in]`, the layer's input."""
        if self._omega is None:
            omega = torch.randn(len(self.values), g.shape[1], generator=keyed_generator(self._key))
            self._omega = omega.to(g.device)
        with exact_products():
            self.values.addmm_(self._omega @ g.float().t(), rows.float())


def dominant_rows(sketch: Tensor, r: int) -> Tensor | None:
    """Return an orthogonal basis `[r, in]` of the sketch's dominant row space, fp32 on the CPU; None without one."""
    if not torch.isfinite(sketch).all() or not sketch.any():
        return None
    return torch.linalg.svd(sketch.cpu(), full_matrices=False).Vh[:r].contiguous().mul_(ROW_NORM)

"""Adam as the releases of GaLore, Fira and APOLLO have it: ε is added before the bias is corrected.

It came with the AdamW of Hugging Face's transformers: a step is `c·N` with `N = m / (√v + ε)` and
`c = √(1 − β₂ᵗ) / (1 − β₁ᵗ)`. The rules need N and c by themselves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from relora_ds.config.rules import Number
from relora_ds.matrix.optimizer import State, average_in


@dataclass(frozen=True)
class ProjectedAdam:
    """Adam of a projected gradient. The state has its moments `m` and `v`, and `step`, the number of updates."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Number("above 0")] = 1e-6

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"ProjectedAdam.betas: {self.betas} is not two numbers inside [0, 1); use (0.9, 0.999)")

    def begin(self, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> State:
        """Return the state before the first update. shape: of the projected gradient."""
        m, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return {"m": m, "v": v, "step": torch.zeros((), dtype=torch.int64)}

    def advance(self, projected: Tensor, has_gradient: Tensor, state: State) -> tuple[Tensor, float]:
        """Take a projected gradient into the moments, in place, and return N and c."""
        first, second = self.betas
        m = average_in(projected, state["m"], first, has_gradient)
        v = average_in(projected.square(), state["v"], second, has_gradient)
        step = int(state["step"].add_(1))
        return m / v.sqrt().add_(self.eps), math.sqrt(1 - second**step) / (1 - first**step)

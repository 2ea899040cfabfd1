"""Muon (Jordan et al., 2024): Nesterov momentum, orthogonalised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relora_ds.config.matrix_config import MuonConfig
from relora_ds.lowrank.formats import DTYPES
from relora_ds.lowrank.orthogonal import orthogonalized
from relora_ds.matrix.optimizer import MatrixOptimizer, State, average_in


@dataclass
class Muon(MatrixOptimizer, MuonConfig):
    """Muon. The state has `momentum`, the mean gradient.

    Attributes:
        momentum: its decay.
        adjust: how the learning rate depends on the shape. "match_rms_adamw": times `0.2 · √max(out, in)`, so that
            entries have the root mean square that AdamW's updates have (arXiv 2502.16982). "original": times
            `√max(1, out/in)`.
        precision: of the products that orthogonalise, "fp32" or "bf16"; "fp32" leaves fp64 as it is.
    """

    decays_first = True

    def begin(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        return {"momentum": torch.zeros(shape, device=device, dtype=dtype)}

    def _step(self, gradient: Tensor, has_gradient: Tensor, state: State, key: str) -> Tensor:
        momentum = average_in(gradient, state["momentum"], self.momentum, has_gradient)
        products = DTYPES[self.precision] if self.precision != "fp32" else None
        nesterov = gradient.lerp(momentum, self.momentum)
        return orthogonalized(nesterov, products).mul_(self._length(gradient.shape))

    def _length(self, shape: Sequence[int]) -> float:
        rows, columns = shape[-2:]
        if self.adjust == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))

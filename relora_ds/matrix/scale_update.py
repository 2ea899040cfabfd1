"""SCALE (arXiv 2506.16659): gradients with normalised rows, and momentum in the output layer alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from relora_ds.config.matrix_config import ScaleConfig
from relora_ds.matrix.optimizer import MatrixOptimizer, State, average_in

DIMENSIONS = {"hidden": -1, "head": -1, "embedding": -2}  # along which entries get a root mean square of 1


@dataclass
class Scale(MatrixOptimizer, ScaleConfig):
    """SCALE. The state has `momentum` for the head, else nothing.

    Attributes:
        kind: "head" is the output layer, also where the embedding shares its weight.
        momentum: decay of the head's mean gradient.
    """

    decays_first = True

    kind: Literal["hidden", "head", "embedding"] = "hidden"

    def begin(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        return {"momentum": torch.zeros(shape, device=device, dtype=dtype)} if self.kind == "head" else {}

    def _step(self, gradient: Tensor, has_gradient: Tensor, state: State, key: str) -> Tensor:
        if self.kind == "head":
            gradient = average_in(gradient, state["momentum"], self.momentum, has_gradient)
        dim = DIMENSIONS[self.kind]
        rms = torch.linalg.vector_norm(gradient, dim=dim, keepdim=True).div_(math.sqrt(gradient.shape[dim]))
        # Squares of what is smaller than this are not precise, or 0.
        return gradient / rms.clamp_min_(math.sqrt(torch.finfo(rms.dtype).tiny))

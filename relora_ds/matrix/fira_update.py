"""Fira (arXiv 2410.01623): GaLore's update, and what GaLore leaves out of the gradient, scaled as Adam scales the rest.

    every T updates     Q = the r dominant singular vectors of the gradient along its shorter side
    in each             R = G·Qᵀ, Adam's N and c of R, φ = ‖N‖ / ‖R‖ per row, S = (G − R·Q) ∘ φ, limited in its growth

The release differs from the paper in three ways, and the published results were made with it:

    paper   S = (G − R·Q) ∘ c·φ         W −= lr · α · (c·N·Q + S)
    code    S = (G − α·R·Q) ∘ φ         W −= lr · c · (α·N·Q + S)

Moments are carried from basis to basis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from relora_ds.config.matrix_config import FiraConfig
from relora_ds.config.rules import Integer
from relora_ds.matrix import limiter
from relora_ds.matrix.adam import ProjectedAdam
from relora_ds.matrix.bases import dominant_basis, like, norm_ratios, projected_shape, tall, unit_basis
from relora_ds.matrix.optimizer import MatrixOptimizer, State


@dataclass
class Fira(MatrixOptimizer, FiraConfig):
    """Fira. The state has `basis` beside those of Adam and the limiter.

    A matrix that never had a gradient when the basis was chosen has the first unit vectors for one.

    Attributes:
        r: of the basis; of a weight with a shorter side, that.
        alpha: α.
        update_proj_gap: T.
        variant: as above.
    """

    r: Annotated[int, Integer(1, example=128)]
    adam: ProjectedAdam = ProjectedAdam()

    def begin(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        r = min(self.r, *shape[-2:])
        adam = self.adam.begin(projected_shape(shape, r), device, dtype)
        return {**adam, **limiter.begin(shape, device, dtype), "basis": unit_basis(shape, r, device, dtype)}

    def _step(self, gradient: Tensor, has_gradient: Tensor, state: State, key: str) -> Tensor:
        if int(state["step"]) % self.update_proj_gap == 0:
            self._choose_basis(gradient, has_gradient, state["basis"])
        basis, whole = state["basis"], tall(gradient)
        projected = whole @ basis.mT
        normalized, c = self.adam.advance(projected, has_gradient, state)
        ratios = norm_ratios(normalized, projected, dim=-1)
        is_paper = self.variant == "paper"
        residual = (projected @ basis).mul_(-1.0 if is_paper else -self.alpha).add_(whole)
        residual = limiter.limit_growth(residual.mul_(ratios * c if is_paper else ratios), has_gradient, state)
        step = residual.mul_(self.alpha if is_paper else c).add_(normalized @ basis, alpha=self.alpha * c)
        return like(gradient.shape, step)

    def _choose_basis(self, gradient: Tensor, has_gradient: Tensor, basis: Tensor) -> None:
        """Write the basis of the coming updates; it stays where there is no gradient, or no decomposition of it."""
        chosen = dominant_basis(gradient.masked_fill(~has_gradient, 0.0), basis.shape[-2])
        if chosen is not None:
            basis.copy_(torch.where(has_gradient, chosen, basis))

"""APOLLO and APOLLO-Mini (arXiv 2412.05270): the gradient itself, as long as Adam would make it.

    every T updates     P = a random projection onto r coordinates, along the gradient's shorter side
    in each             R = G·Pᵀ, Adam's N and c of R, f = ‖N‖ / ‖R‖ of each row (channel) or of all (tensor),
                        W −= lr · c · √scale · G∘f, limited in its growth

Adam's moments are of R alone and carried from projection to projection. APOLLO-Mini is r = 1 with one f for a matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from relora_ds.config.matrix_config import ApolloConfig
from relora_ds.config.rules import Integer
from relora_ds.matrix import limiter
from relora_ds.matrix.adam import ProjectedAdam
from relora_ds.matrix.bases import like, norm_ratios, projected_shape, random_projection, tall
from relora_ds.matrix.optimizer import MatrixOptimizer, State

DIMENSIONS: dict[str, int | tuple[int, int]] = {"channel": -1, "tensor": (-2, -1)}


@dataclass
class Apollo(MatrixOptimizer, ApolloConfig):
    """APOLLO. The state has those of Adam and the limiter.

    P is not in it: the key of the weight and the number of the projection decide P. It is kept as long as it is in use.

    Attributes:
        r: coordinates that P keeps; of a weight with a shorter side, that.
        scale_type: what has an f of its own: a row of the longer side, or the matrix.
        scale: its root multiplies the update.
        scale_front: before the limiter, which sees it then; else after.
        update_proj_gap: T.
        limits: the growth of the update.
    """

    r: Annotated[int, Integer(1, example=128)]
    adam: ProjectedAdam = ProjectedAdam()
    _in_use: dict[str, tuple[int, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def begin(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        adam = self.adam.begin(projected_shape(shape, self._rank(shape)), device, dtype)
        return {**adam, **(limiter.begin(shape, device, dtype) if self.limits else {})}

    def kept_bytes(self, shape: Sequence[int]) -> int:
        """Return the size of P in fp32."""
        return 4 * self._rank(shape) * min(shape[-2:])

    def _step(self, gradient: Tensor, has_gradient: Tensor, state: State, key: str) -> Tensor:
        projection = self._projection(int(state["step"]) // self.update_proj_gap, gradient, key)
        whole = tall(gradient)
        projected = whole @ projection.mT
        normalized, c = self.adam.advance(projected, has_gradient, state)
        ratios = norm_ratios(normalized, projected, DIMENSIONS[self.scale_type])
        before, after = math.sqrt(self.scale), c
        if not self.scale_front:
            before, after = 1.0, c * before
        step = whole * ratios.mul_(before)
        if self.limits:
            step = limiter.limit_growth(step, has_gradient, state)
        return like(gradient.shape, step.mul_(after))

    def _projection(self, number: int, gradient: Tensor, key: str) -> Tensor:
        """Return P, on the gradient's device. number: of P in the order of a run, from 0."""
        if key not in self._in_use or self._in_use[key][0] != number:
            drawn = random_projection(gradient.shape, self._rank(gradient.shape), f"{key}/{number}")
            self._in_use[key] = number, drawn.to(gradient)
        return self._in_use[key][1]

    def _rank(self, shape: Sequence[int]) -> int:
        return min(self.r, *shape[-2:])

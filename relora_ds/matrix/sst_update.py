"""Sparse Spectral Training (SST, arXiv 2405.15481): W is trained in its singular vectors and values.

    W = U·diag(σ)·Vᵀ        decomposed before the first update, and anew after every round
    in each update          all of σ, by Adam, not below 0; r sampled columns of U and of V, by Adam, then of length 1
    every T updates         other columns, by chance and by the size of σ; their moments begin again, and so does the
                            learning rate, over a few updates
    a round                 ⌈p/r⌉ such iterations

The paper's layers multiply with the factors. What they do to W depends on W's gradient alone (`matrix.spectral`), so
that here the layers multiply with W, which every rank forms from the factors. The paper's code cannot be had: T, the
warm-up, and that moments of σ begin again after a decomposition, which changes the order of σ, are inferred.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from relora_ds.config.matrix_config import SSTConfig
from relora_ds.config.rules import Integer, Number
from relora_ds.matrix import spectral
from relora_ds.matrix.factored import FactoredOptimizer
from relora_ds.matrix.optimizer import State

_FACTORS = ("left", "sigma", "right")


@dataclass
class SST(FactoredOptimizer, SSTConfig):
    """SST of matrices.

    The state has U, σ and V as `left`, `sigma` and `right`, the indices `sampled`, Adam's moments, and `step`. A weight
    without a gradient keeps all of it, the count too. Nothing else may change W, which is the product of the factors
    after every update.

    Attributes:
        r: triplets that train at a time; of a weight with a shorter side, all.
        betas, eps: Adam's.
        iteration_steps: T, updates in which the same columns train.
        iteration_warmup_steps: updates of an iteration in which the learning rate climbs.
    """

    shared: ClassVar[tuple[str, ...]] = ("left", "sigma", "right", "sampled", "step")

    r: Annotated[int, Integer(1, example=128)]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Number("above 0")] = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"SST.betas: {self.betas} is not two numbers inside [0, 1); use (0.9, 0.999)")

    def begin(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        rows, columns = shape
        p = min(shape)
        r = min(self.r, p)
        sizes = {"left": (rows, p), "sigma": (p,), "right": (columns, p)}
        trained = {"left": (rows, r), "sigma": (p,), "right": (columns, r)}
        moments = {f"{what}_{moment}": size for what, size in trained.items() for moment in ("m", "v")}
        zeros = {name: torch.zeros(size, device=device, dtype=dtype) for name, size in (sizes | moments).items()}
        sampled = torch.zeros(r, device=device, dtype=torch.int64)
        return {**zeros, "sampled": sampled, "step": torch.zeros((), dtype=torch.int64)}

    def begins_factors(self, state: State) -> bool:
        """Return whether a round begins with the coming step."""
        return int(state["step"]) % self._round_steps(state) == 0

    def decompose(self, state: State, weight: Tensor | None) -> None:
        """Give W its singular vectors and values. weight: W before the first step; from then on it is their product."""
        if int(state["step"]):
            weight = self.product(state)
        assert weight is not None
        for name, found in zip(_FACTORS, spectral.decompose(weight), strict=True):
            state[name].copy_(found)

    def begin_step(self, state: State, key: str) -> None:
        """Sample columns where an iteration begins. The moments of what is new begin again."""
        step = int(state["step"])
        if step % self.iteration_steps:
            return
        for name in _FACTORS if self.begins_factors(state) else ("left", "right"):
            for moment in ("m", "v"):
                if (value := state.get(f"{name}_{moment}")) is not None:
                    value.zero_()
        r = state["sampled"].numel()
        state["sampled"].copy_(spectral.sample(state["sigma"], r, f"{key}/{step // self.iteration_steps}"))

    def project(self, gradient: Tensor, state: State) -> Tensor:
        """Return the enhanced gradients of the sampled columns of U and V, and that of σ: `[r·(out + in) + p]`."""
        of = spectral.enhanced_gradients(gradient, state["left"], state["right"], state["sampled"])
        return torch.cat([part.reshape(-1) for part in of])

    def train(self, projected: Tensor, state: State, lr: float) -> None:
        """Take a step of Adam with σ and the sampled columns."""
        step, sampled = int(state["step"]), state["sampled"]
        in_iteration, in_round = step % self.iteration_steps + 1, step % self._round_steps(state) + 1
        lr *= min(1.0, in_iteration / max(1, self.iteration_warmup_steps))
        *of_columns, of_sigma = self._parts(projected, state)
        for name, gradient in zip(("left", "right"), of_columns, strict=True):
            columns = state[name].index_select(1, sampled)
            columns.sub_(self._adam(gradient, state, name, in_iteration), alpha=lr)
            state[name].index_copy_(1, sampled, spectral.normalize_columns_(columns))
        state["sigma"].sub_(self._adam(of_sigma, state, "sigma", in_round), alpha=lr).clamp_(min=0)
        state["step"].add_(1)

    def changed(self, state: State) -> Tensor:
        """Return the sampled columns of U and V, and σ."""
        columns = (state[name].index_select(1, state["sampled"]).view(-1) for name in ("left", "right"))
        return torch.cat([*columns, state["sigma"]])

    def follow(self, changed: Tensor, state: State) -> None:
        """Take the sampled columns of U and V, and σ."""
        left, right, sigma = self._parts(changed, state)
        state["left"].index_copy_(1, state["sampled"], left)
        state["right"].index_copy_(1, state["sampled"], right)
        state["sigma"].copy_(sigma)
        state["step"].add_(1)

    def product(self, state: State) -> Tensor:
        """Return `U·diag(σ)·Vᵀ`."""
        return spectral.product(*(state[name] for name in _FACTORS))

    def _parts(self, flat: Tensor, state: State) -> list[Tensor]:
        """Return the parts of what `project` and `changed` return: `[out, r]`, `[in, r]` and `[p]`."""
        r = state["sampled"].numel()
        shapes = [(len(state["left"]), r), (len(state["right"]), r), (len(state["sigma"]),)]
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _adam(self, gradient: Tensor, state: State, name: str, count: int) -> Tensor:
        """Take a gradient into the moments, and return Adam's step at a learning rate of 1. It uses the gradient up.

        count: of steps, with this one.
        """
        (first, second), m, v = self.betas, state[f"{name}_m"], state[f"{name}_v"]
        m.lerp_(gradient, 1 - first)
        v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = gradient.copy_(v).div_(1 - second**count).sqrt_()
        return m.div(1 - first**count).div_(root.add_(self.eps))

    def _round_steps(self, state: State) -> int:
        return self.iteration_steps * -(-state["sigma"].numel() // state["sampled"].numel())

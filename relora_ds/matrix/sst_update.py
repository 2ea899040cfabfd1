"""Sparse Spectral Training (SST, arXiv 2405.15481): W is trained in its singular vectors and values.

    W = U·diag(σ)·Vᵀ        decomposed before the first update, and anew after every round
    in each update          all of σ, by Adam, not below 0; r sampled columns of U and of V, by Adam, then of length 1
    every T updates         other columns, by chance and by the size of σ; their moments begin again, and so does the
                            learning rate, over a few updates
    a round                 ⌈p/r⌉ such iterations

The paper's layers multiply with the factors. What they do to W depends on W's gradient alone (`matrix.spectral`), so
that here the layers multiply with W, and its owner has the factors. The paper's code cannot be had: T, the warm-up, and
that moments of σ begin again after a decomposition, which changes the order of σ, are inferred.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from relora_ds.config.matrix_config import SSTConfig
from relora_ds.config.rules import Integer, Number
from relora_ds.matrix import spectral
from relora_ds.matrix.optimizer import MatrixOptimizer, State


@dataclass
class SST(MatrixOptimizer, SSTConfig):
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

    reads_weight: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False
    takes_weight_decay: ClassVar[bool] = False

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

    def _change(
        self, gradient: Tensor, has_gradient: Tensor, state: State, lr: float, key: str, weight: Tensor | None
    ) -> Tensor:
        assert weight is not None
        if not has_gradient:
            return torch.zeros_like(gradient)
        self._begin_iteration(state, key, weight)
        self._train(gradient, state, lr)
        return spectral.product(state["left"], state["sigma"], state["right"]).sub_(weight)

    def _begin_iteration(self, state: State, key: str, weight: Tensor) -> None:
        """Sample columns where an iteration begins, and decompose W before a round."""
        step = int(state["step"])
        if step % self.iteration_steps:
            return
        if step % self._round_steps(state) == 0:
            factors = [state[name] for name in ("left", "sigma", "right")]
            # After the first round from the factors: a W that is stored in less than fp32 may have no master.
            for factor, value in zip(
                factors, spectral.decompose(spectral.product(*factors) if step else weight), strict=True
            ):
                factor.copy_(value)
            _zero(state, "sigma")
        _zero(state, "left", "right")
        r = state["sampled"].numel()
        state["sampled"].copy_(spectral.sample(state["sigma"], r, f"{key}/{step // self.iteration_steps}"))

    def _train(self, gradient: Tensor, state: State, lr: float) -> None:
        """Take a step of Adam with σ and the sampled columns."""
        step, sampled = int(state["step"]), state["sampled"]
        in_iteration, in_round = step % self.iteration_steps + 1, step % self._round_steps(state) + 1
        lr *= min(1.0, in_iteration / max(1, self.iteration_warmup_steps))
        of_left, of_right, of_sigma = spectral.enhanced_gradients(gradient, state["left"], state["right"], sampled)
        for name, of_columns in (("left", of_left), ("right", of_right)):
            columns = state[name].index_select(1, sampled)
            columns.sub_(self._adam(of_columns, state, name, in_iteration), alpha=lr)
            state[name].index_copy_(1, sampled, spectral.normalize_columns_(columns))
        state["sigma"].sub_(self._adam(of_sigma, state, "sigma", in_round), alpha=lr).clamp_(min=0)
        state["step"].add_(1)

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


def _zero(state: State, *names: str) -> None:
    for name in names:
        state[f"{name}_m"].zero_()
        state[f"{name}_v"].zero_()

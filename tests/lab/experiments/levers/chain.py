"""A weight that a one-sided chain trains, with every variant that is measured."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One variant. What is not named is GaLore at a quarter of the width.

    Attributes:
        lr, lr_low: peak learning rate of what trains at full rank, and of the low-rank part (None: the same).
        r, r_end: rank, and what it shrinks to by the end of the run.
        restart_every, restart_every_end: steps of a cycle, and what it grows to by the end of the run.
        basis: `exact` dominant rows of one gradient; `momentum`, `accumulated`: of a moving average (0.99), or of the
            cycle's sum; `mixed`: half of it at random; `sampled`: singular vectors drawn by their singular values;
            `warm_sketch`: of a sketch that begins with Adam's moments; `random`.
        moments: `carried`, `rotated` or `zeroed` at a restart.
        alternates: right and left factor are frozen in turns, each with moments of its own.
        full_steps: full rank in these first steps, at lr_full.
        fira_steps: the residual is applied at every step in these first steps (Fira, arXiv 2410.01623).
        both_from: from this step on both factors train, as in LoRA, and are merged every 1,000 steps.
        residual_every: steps after which the gathered residual is applied; None: it is left out.
        residual: how: `muon` orthogonalised (arXiv 2502.16982), or `adam`, with moments of full rank.
    """

    method: str = "chain"
    lr: float = 4e-3
    lr_low: float | None = None
    r: int = 16
    r_end: int | None = None
    restart_every: int = 200
    restart_every_end: int | None = None
    basis: str = "exact"
    moments: str = "carried"
    alternates: bool = False
    full_steps: int = 0
    lr_full: float = 2e-3
    fira_steps: int = 0
    both_from: int | None = None
    residual_every: int | None = None
    residual: str = "muon"
    residual_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)


class Adam:
    """Adam's moments of one tensor."""

    def __init__(self, shape: torch.Size | tuple[int, ...], betas: tuple[float, float] = (0.9, 0.999)):
        self.mean, self.square, self.steps, self.betas = torch.zeros(shape), torch.zeros(shape), 0, betas

    def update(self, gradient: Tensor) -> Tensor:
        """Take a gradient in, and return what a learning rate of 1 subtracts."""
        first, second = self.betas
        self.steps += 1
        self.mean.mul_(first).add_(gradient, alpha=1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        return (self.mean / (1 - first**self.steps)) / ((self.square / (1 - second**self.steps)).sqrt() + 1e-8)

    def rotate(self, turn: Tensor) -> None:
        """Turn both moments into a new basis, after LDAdam (arXiv 2410.16103)."""
        first, second = (1 - beta**self.steps for beta in self.betas)
        mean = self.mean @ turn
        variance = self.square / second - (self.mean / first).square()
        self.mean, self.square = mean, (variance @ turn.square() + (mean / first).square()).abs() * second

    def shrink(self, r: int) -> None:
        self.mean, self.square = self.mean[:, :r].contiguous(), self.square[:, :r].contiguous()


class Chain:
    """The chain of one weight `[out, in]`, which it changes in place. `basis` has orthonormal rows."""

    def __init__(self, weight: Tensor, settings: Settings, generator: torch.Generator):
        self.weight, self.settings, self.generator = weight, settings, generator
        self.left = False  # the left factor is frozen: of Wᵀ it is the right one
        self.cycles = 0
        self.basis: Tensor | None = None
        self.adam = Adam((0, 0))
        self.other_side: tuple[Tensor | None, Adam] = (None, Adam((0, 0)))
        self.average, self.sum = torch.zeros_like(weight), torch.zeros_like(weight)
        self.residual, self.gathered = torch.zeros_like(weight), 0
        self.residual_adam = Adam(weight.shape, (0.9, 0.95))
        self.limit: float | None = None

    def restart(self, gradient: Tensor, r: int) -> None:
        """Choose the basis of the next cycle."""
        settings = self.settings
        if settings.alternates and self.cycles:
            self.left = not self.left
            self.other_side, (self.basis, self.adam) = (self.basis, self.adam), self.other_side
        self.cycles += 1
        source = {"momentum": self.average, "accumulated": self.sum}.get(settings.basis, gradient)
        source = source.T if self.left else source
        r = min(r, *source.shape)
        old, self.basis = self.basis, self._basis(source, r)
        self.sum.zero_()
        if old is None or settings.moments == "zeroed":
            self.adam = Adam((len(source), r), settings.betas)
        elif settings.moments == "rotated":
            self.adam.rotate(old @ self.basis.T)
        elif self.adam.mean.shape[1] > r:
            self.adam.shrink(r)

    def _basis(self, source: Tensor, r: int) -> Tensor:
        kind, width = self.settings.basis, source.shape[1]
        if kind == "random":
            return torch.linalg.qr(torch.randn(width, r, generator=self.generator)).Q.T.contiguous()
        if kind == "mixed":
            half = dominant_rows(source, r // 2)
            rest = torch.randn(width, r - len(half), generator=self.generator)
            return torch.cat([half, torch.linalg.qr(rest - half.T @ (half @ rest)).Q.T])
        if kind == "sampled":
            _, values, rows = torch.linalg.svd(source.double(), full_matrices=False)
            return with_signs(rows[torch.multinomial(values.float(), r, generator=self.generator)].float())
        if kind == "warm_sketch":
            omega = torch.randn(8 if self.adam.steps else r + 8, len(source), generator=self.generator)
            if self.adam.steps:
                omega = torch.cat([torch.linalg.qr(self.adam.mean).Q.T * math.sqrt(len(source)), omega])
            return dominant_rows(omega @ source, r)
        return dominant_rows(source, r)

    def norm_square(self, gradient: Tensor) -> float:
        """Return the squared norm of the gradient that the clip sees."""
        assert self.basis is not None
        return float(((gradient.T if self.left else gradient) @ self.basis.T).square().sum())

    def step(self, gradient: Tensor, lr: float, decay: float, with_fira: bool) -> None:
        """Apply one gradient. lr: of the low-rank part. decay: the learning rate as a part of its peak."""
        assert self.basis is not None
        settings = self.settings
        if settings.basis == "momentum":
            self.average.mul_(0.99).add_(gradient)
        elif settings.basis == "accumulated":
            self.sum.add_(gradient)
        seen = gradient.T if self.left else gradient
        inside = seen @ self.basis.T
        update = self.adam.update(inside)
        change, rest = update @ self.basis, seen - inside @ self.basis
        if with_fira:
            change = change + self._limited(rest * (update.norm() / (inside.norm() + 1e-8)))
        self.weight.sub_((change.T if self.left else change) * lr)
        if settings.residual_every:
            self.residual.add_(rest.T if self.left else rest)
            self.gathered += 1
            if self.gathered == settings.residual_every:
                self._apply_residual(settings.residual_lr * decay)

    def _apply_residual(self, lr: float) -> None:
        mean = self.residual / self.gathered
        if self.settings.residual == "muon":
            change = orthogonalized(mean) * max(1, mean.shape[0] / mean.shape[1]) ** 0.5
        else:
            change = self.residual_adam.update(mean)
        self.weight.sub_(change * lr)
        self.residual.zero_()
        self.gathered = 0

    def _limited(self, residual: Tensor) -> Tensor:
        """Return Fira's residual, whose norm grows by 1 % a step at most."""
        norm = float(residual.norm())
        if self.limit is not None and norm > 1.01 * self.limit:
            residual, norm = residual * (1.01 * self.limit / norm), 1.01 * self.limit
        self.limit = norm
        return residual


def dominant_rows(matrix: Tensor, r: int) -> Tensor:
    """Return an orthonormal basis `[r, in]` of the dominant row space."""
    return with_signs(torch.linalg.svd(matrix.double(), full_matrices=False).Vh[:r].float())


def with_signs(rows: Tensor) -> Tensor:
    """Make the largest entry of each row positive."""
    return rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return Muon's approximation of the nearest orthogonal matrix: five steps of Newton-Schulz."""
    x = matrix / (matrix.norm() + 1e-12)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x

"""Singular values of the update that training made to a weight, and the rank that they amount to.

ReLoRA's claim is about them: low-rank updates, merged one after the other, add up to one of high rank
(arXiv 2307.05695, Figures 3 and 4). "Rank" has several readings, because a trained update has no singular value that is
exactly 0; `Spectrum` has the usual ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from relora_ds.lowrank.seeding import keyed_seed

EXACT_UP_TO = 4096  # smaller side of a matrix; the time of an exact decomposition grows with its cube
NUM_LARGEST = 1024  # singular values of a larger one
RANK_SHARE = 0.01  # of the largest singular value: what is below it does not count as a direction
SMALL = 0.1  # a singular value near zero, in the paper's Figure 4
_OVERSAMPLING, _POWER_ITERATIONS = 64, 4


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix.

    Attributes:
        singular_values: `[n]`, the largest first; on the CPU.
        num_all: how many the matrix has: its smaller side.
        norm: of the whole matrix (Frobenius): the root of the sum of the squares of all singular values.
    """

    singular_values: Tensor
    num_all: int
    norm: float

    @property
    def is_exact(self) -> bool:
        """All singular values are there; else the largest, approximately: each at most what it really is."""
        return len(self.singular_values) == self.num_all

    @property
    def largest(self) -> float:
        return float(self.singular_values[0])

    def numerical_rank(self, share: float = RANK_SHARE) -> int:
        """Singular values above `share` of the largest one; not more than were computed."""
        return int((self.singular_values > share * self.largest).sum())

    @property
    def stable_rank(self) -> float:
        """`‖·‖_F² / σ₁²`: 1 where one direction has it all, the full rank where all have the same."""
        return (self.norm / self.largest) ** 2 if self.largest else 0.0

    @property
    def effective_rank(self) -> float | None:
        """`exp` of the entropy of `σ / Σσ` (Roy & Vetterli 2007); None where only the largest were computed."""
        if not self.largest:
            return 0.0
        if not self.is_exact:
            return None
        share = self.singular_values.double()
        share = share / share.sum()
        return float(torch.special.entr(share).sum().exp())

    def count_below(self, limit: float = SMALL) -> int | None:
        """Singular values below `limit`, of all; None where the largest ones, all that were computed, do not tell."""
        num_others = int((self.singular_values >= limit).sum())
        if num_others == len(self.singular_values) and not self.is_exact:
            return None
        return self.num_all - num_others


def spectrum_of(update: Tensor, *, exact_up_to: int = EXACT_UP_TO, num_largest: int = NUM_LARGEST) -> Spectrum:
    """Return the singular values of a matrix `[out, in]`, in fp64 where it is in fp64, else in fp32.

    Args:
        exact_up_to: smaller side up to which all are computed. Of a larger matrix the `num_largest` largest ones are,
            by a randomised decomposition (Halko, Martinsson & Tropp 2011, algorithm 5.1); the same every time.

    Raises:
        ValueError: a value is not finite.
    """
    assert update.ndim == 2 and num_largest >= 1
    update = update.detach().to("cpu", torch.promote_types(update.dtype, torch.float32))
    if not torch.isfinite(update).all():
        raise ValueError(
            f"an update of shape {tuple(update.shape)} has values that are not finite; use a checkpoint "
            "from before the training diverged"
        )
    num_all = min(update.shape)
    values = torch.linalg.svdvals(update) if num_all <= exact_up_to else _largest(update, min(num_largest, num_all))
    return Spectrum(values, num_all, float(torch.linalg.vector_norm(update, dtype=torch.float64)))


def _largest(update: Tensor, num: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
        torch.default_generator.manual_seed(keyed_seed("spectrum"))
        size = min(num + _OVERSAMPLING, *update.shape)
        return torch.svd_lowrank(update, q=size, niter=_POWER_ITERATIONS)[1][:num]

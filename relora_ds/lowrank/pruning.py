"""Pruning of Adam moments at a restart: which entries survive.

A tensor may be split over ranks. Everything here works on the local piece and leaves the sums over
ranks to a `reduce` callback (an all-reduce in `zero/`, nothing in one process), so that the same code
is exact for a whole tensor and for a shard.

The threshold is found by a radix select on the bits of |x|: for non-negative fp32 numbers the order of
the bit patterns is the order of the values. Three histograms of 11, 10 and 10 bits fix all 31 bits, for
all tensors at once, whatever their size and however many ranks hold them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, bits) from the most significant digit down


def num_kept(numel: int, reset_ratio: float) -> int:
    """Return how many of `numel` entries survive a reset of `reset_ratio`; the rest, rounded, are pruned."""
    return numel - round(reset_ratio * numel)


def _magnitude_bits(values: Tensor) -> Tensor:
    return values.detach().to(torch.float32).abs().view(torch.int32)


def _no_reduce(_: Tensor) -> None:
    pass


def kth_largest_magnitude(
    values: Sequence[Tensor], keep: Sequence[int], reduce: Callable[[Tensor], None] = _no_reduce
) -> tuple[Tensor, Tensor]:
    """Return for each tensor the bits of its `keep`-th largest magnitude, exactly, over all its pieces.

    Args:
        values: the local 1-D pieces, one per tensor, possibly empty; all on one device.
        keep: per tensor, how many of its largest magnitudes survive; at most the number of all entries.
        reduce: sums an int32 tensor in place over the holders of the other pieces.

    Returns:
        `(threshold, num_ties)`, int32 and int64 `[num_tensors]`: the bit pattern of the smallest
        surviving magnitude, and how many of the entries that equal it survive.
        Where `keep` is 0, a threshold that nothing reaches.
    """
    device = values[0].device
    num_tensors = len(values)
    prefix = torch.zeros(num_tensors, dtype=torch.int32, device=device)
    wanted = torch.tensor(keep, dtype=torch.int64, device=device)
    nothing = wanted == 0
    for shift, bits in _DIGITS:
        histogram = torch.zeros(num_tensors, 1 << bits, dtype=torch.int32, device=device)
        for i, piece in enumerate(values):
            pattern = _magnitude_bits(piece)
            counts = (pattern >> (shift + bits)) == (prefix[i] >> (shift + bits))
            digit = (pattern >> shift) & ((1 << bits) - 1)
            # Weighted by 0 or 1, as an index by a mask or bincount would have the host wait for a GPU.
            histogram[i].scatter_add_(0, digit.to(torch.int64), counts.to(torch.int32))
        reduce(histogram)
        # Entries whose digit is at least d, counted from the largest digit down.
        at_least = histogram.to(torch.int64).flip(1).cumsum(1).flip(1)
        digit = ((at_least >= wanted[:, None]).sum(1) - 1).clamp(min=0)
        above = at_least.gather(1, (digit + 1).clamp(max=(1 << bits) - 1)[:, None]).squeeze(1)
        above = torch.where(digit == (1 << bits) - 1, 0, above)
        wanted = wanted - above
        prefix = prefix | (digit.to(torch.int32) << shift)
    return torch.where(nothing, torch.iinfo(torch.int32).max, prefix), torch.where(nothing, 0, wanted)


def keep_mask(values: Tensor, threshold: Tensor, num_ties: Tensor) -> Tensor:
    """Bool mask of the local piece: every magnitude above `threshold`, and the first `num_ties` equal to it.

    `num_ties` is what is left for this piece after the pieces before it took theirs: ties go to the
    lowest flat index, so that the mask does not depend on how a tensor is split.
    """
    pattern = _magnitude_bits(values)
    ties = pattern == threshold
    return (pattern > threshold) | (ties & (ties.cumsum(0) <= num_ties))


def count_ties(values: Tensor, threshold: Tensor) -> Tensor:
    """Return how many entries of the local piece equal the threshold; int64 scalar."""
    return (_magnitude_bits(values) == threshold).sum()


def magnitude_mask(values: Tensor, reset_ratio: float) -> Tensor:
    """Bool mask of a whole tensor's largest `1 - reset_ratio` magnitudes, exactly `num_kept` of them."""
    flat = values.flatten()
    threshold, ties = kth_largest_magnitude([flat], [num_kept(flat.numel(), reset_ratio)])
    return keep_mask(flat, threshold[0], ties[0]).view(values.shape)


def random_mask(numel: int, reset_ratio: float, generator: torch.Generator) -> Tensor:
    """Bool mask `[numel]` on CPU with exactly `num_kept` entries True, drawn from a CPU generator."""
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=generator)[: num_kept(numel, reset_ratio)]] = True
    return mask

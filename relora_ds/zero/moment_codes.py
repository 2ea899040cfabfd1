"""Values in blocks of 256, each a code into a table of levels, with one fp32 scale a block: bitsandbytes' 8-bit states.

bitsandbytes rounds in its own step; here its states are read and written. Decoded values that are encoded again give
back the same values, to the bit, also after some of them were set to 0: the scale is recovered from the values. That
is what lets a checkpoint hold moments in fp32.
"""

import torch
from torch import Tensor

BLOCK = 256
_CHUNK = 1024  # blocks whose scales are looked for at a time
_NEIGHBOURS = range(-2, 3)  # fp32 numbers beside value / level, of which one is the scale: both were rounded once


def decode(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Return fp32 values `[n]`. codes: uint8 `[n]`, from the beginning of a block on. scales: of their blocks."""
    values = levels[codes.int()]
    whole = values.numel() // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
    if whole < values.numel():
        values[whole:].mul_(scales[-1])
    return values.add_(0.0)  # a zero has no sign


def encode(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(codes, scales)` of fp32 values `[n]`: those that blocks were decoded to exactly, others rounded."""
    num_blocks = -(-values.numel() // BLOCK)
    blocks = values.new_zeros(num_blocks, BLOCK)
    blocks.view(-1)[: values.numel()] = values
    scales = blocks.abs().amax(1)
    codes = _nearest(blocks, scales, levels)
    inexact = (_decoded(codes, scales, levels) != blocks).any(1).nonzero().view(-1)
    for rows in inexact.split(_CHUNK):
        found = _exact_scales(blocks[rows], levels)
        rows, found = rows[found > 0], found[found > 0]
        scales[rows], codes[rows] = found, _nearest(blocks[rows], found, levels)
    return codes.view(-1)[: values.numel()], scales


def _decoded(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    return levels[codes.int()] * scales[:, None]


def _nearest(blocks: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Return the codes `[k, BLOCK]` of the levels that are nearest to values / scale."""
    normal = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    return torch.bucketize(normal, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def _exact_scales(blocks: Tensor, levels: Tensor) -> Tensor:
    """Return the scale that each of `[k, BLOCK]` blocks was decoded with; 0 where there is none.

    One of the levels times the scale is the block's largest magnitude. Few of the scales which that allows make a
    multiple of a level of the second largest as well; these are tried on the whole block.
    """
    sizes = levels[levels > 0].flip(0)
    magnitudes = blocks.abs()
    largest = magnitudes.amax(1, keepdim=True)
    second = torch.where(magnitudes < largest, magnitudes, 0.0).amax(1, keepdim=True)
    candidates = torch.cat([_shifted(largest / sizes, by) for by in _NEIGHBOURS], dim=1)
    fits = (candidates * sizes.repeat(len(_NEIGHBOURS)) == largest) & (candidates > 0) & candidates.isfinite()
    ascending = sizes.flip(0)
    index = torch.bucketize(second / candidates, (ascending[1:] + ascending[:-1]) / 2, out_int32=True)
    fits &= (ascending[index] * candidates == second) | (second == 0)

    found = torch.zeros_like(largest[:, 0])
    for column in fits.any(0).nonzero().view(-1).tolist():
        rows = (fits[:, column] & (found == 0)).nonzero().view(-1)
        scales = candidates[rows, column]
        exact = (_decoded(_nearest(blocks[rows], scales, levels), scales, levels) == blocks[rows]).all(1)
        found[rows[exact]] = scales[exact]
    return found


def _shifted(values: Tensor, by: int) -> Tensor:
    """Return the fp32 numbers `by` places after positive ones."""
    return (values.contiguous().view(torch.int32) + by).view(torch.float32)

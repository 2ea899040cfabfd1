"""Updates, made small for a slow link.

    none    4 bytes an element: the fp32 values themselves
    bf16    2
    int8    1, and a scale of 2 bytes for every block of 64 elements
    int4    1/2, and the same scales
    int2    1/4, and the same scales

Integers are symmetric. The levels of int8 and int4 are evenly spaced up to a block's largest element. Those of int2 are
-3, -1, 1 and 3 times the scale, as four levels up to the largest element would leave next to nothing of the others:
elements are divided between them as is best for a normal distribution (Max, 1960: levels 0.9957 standard deviations
apart), and the scale is the one with the least squared error. What rounding leaves out of embeddings, head, norms and
full-rank updates is kept on the sender and added to the next update (error feedback), so that it arrives later instead
of never.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Compression = Literal["none", "bf16", "int8", "int4", "int2"]
COMPRESSIONS: tuple[str, ...] = get_args(Compression)
BLOCK = 64
_BITS = {"int8": 8, "int4": 4, "int2": 2}
_SPACING = 0.9957


def num_bytes(numel: int, how: str) -> int:
    """Return the bytes that `pack` makes of so many elements."""
    if how in ("none", "bf16"):
        return numel * (4 if how == "none" else 2)
    return 2 * -(-numel // BLOCK) + -(-numel * _BITS[how] // 8)


def pack(value: Tensor, how: str) -> Tensor:
    """Return fp32 values as 1-D uint8 on their device."""
    flat = value.reshape(-1).float().contiguous()
    if how == "none":
        return flat.view(torch.uint8)
    if how == "bf16":
        return flat.bfloat16().view(torch.uint8)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales, codes = _four_levels(blocks, flat.numel()) if how == "int2" else _even_levels(blocks, _BITS[how])
    return torch.cat([scales.view(torch.uint8), _join(codes.view(-1)[: flat.numel()], _BITS[how])])


def unpack(packed: Tensor, shape: torch.Size, how: str) -> Tensor:
    """Return the fp32 values of `shape` that `pack` has made `packed` of, up to what was rounded away."""
    if how == "none":
        return packed.view(torch.float32).view(shape)
    if how == "bf16":
        return packed.view(torch.bfloat16).float().view(shape)
    numel = shape.numel()
    size = 2 * -(-numel // BLOCK)
    scales = packed[:size].clone().view(torch.bfloat16).float().repeat_interleave(BLOCK)[:numel]
    codes = _split(packed[size:], _BITS[how])[:numel].float()
    levels = 2 * codes - 3 if how == "int2" else codes - 2 ** (_BITS[how] - 1)
    return (levels * scales).view(shape)


def _even_levels(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return a scale in bf16 for each block, and codes from 0 on."""
    half = 2 ** (bits - 1)
    scales = (blocks.abs().amax(dim=1) / (half - 1)).bfloat16()
    # Where bf16 rounds a scale down, the largest elements go to the last level.
    levels = (blocks / scales.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
    return scales, levels.clamp_(1 - half, half - 1).add_(half).to(torch.uint8)


def _four_levels(blocks: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Do as `_even_levels`. Only the first `numel` elements of `blocks` are values: the rest fills the last block."""
    counts = torch.full((len(blocks), 1), float(BLOCK), device=blocks.device)
    counts[-1] = numel - (len(blocks) - 1) * BLOCK
    spacing = _SPACING * (blocks.square().sum(dim=1, keepdim=True) / counts).sqrt()
    levels = torch.where(blocks.abs() > spacing, 3.0, 1.0).copysign(blocks)
    is_value = torch.arange(BLOCK, device=blocks.device) < counts
    scales = (blocks * levels).sum(dim=1) / (levels.square() * is_value).sum(dim=1)
    return scales.bfloat16(), (levels + 3).div_(2).to(torch.uint8)


def _join(codes: Tensor, bits: int) -> Tensor:
    """Return bytes, each of them 8 / `bits` codes, the first one in the lowest bits."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % each)).view(-1, each)
    joined = codes[:, 0]
    for place in range(1, each):
        joined = joined | codes[:, place] << place * bits
    return joined


def _split(joined: Tensor, bits: int) -> Tensor:
    """Undo `_join`, up to the codes that fill the last byte."""
    return torch.stack([joined >> shift & 2**bits - 1 for shift in range(0, 8, bits)], dim=1).view(-1)

"""Updates of embeddings, head, norms and of full-rank training, made small for a slow link.

    none    4 bytes an element: the fp32 values themselves
    bf16    2
    int8    1, and a scale of 2 bytes for every block of 64 elements
    int4    1/2, and the same scales

Integers are symmetric: a block's largest element is its last level. What rounding leaves out is kept on the sender and
added to the next update (error feedback), so that it arrives later instead of never.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Compression = Literal["none", "bf16", "int8", "int4"]
COMPRESSIONS: tuple[str, ...] = get_args(Compression)
BLOCK = 64
_LEVELS = {"int8": 127, "int4": 7}


def num_bytes(numel: int, how: str) -> int:
    """Return the bytes that `pack` makes of so many elements."""
    if how in ("none", "bf16"):
        return numel * (4 if how == "none" else 2)
    blocks = -(-numel // BLOCK)
    return 2 * blocks + (numel if how == "int8" else -(-numel // 2))


def pack(value: Tensor, how: str) -> Tensor:
    """Return fp32 values as 1-D uint8 on their device."""
    flat = value.reshape(-1).float().contiguous()
    if how == "none":
        return flat.view(torch.uint8)
    if how == "bf16":
        return flat.bfloat16().view(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = (padded.abs().amax(dim=1) / _LEVELS[how]).bfloat16()
    # Where bf16 rounds a scale down, the largest elements go to the last level.
    codes = (padded / scales.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
    codes = codes.clamp_(-_LEVELS[how], _LEVELS[how]).view(-1)[: flat.numel()].to(torch.int8)
    if how == "int4":
        nibbles = torch.nn.functional.pad(codes + 8, (0, codes.numel() % 2)).view(-1, 2)
        codes = nibbles[:, 0] | nibbles[:, 1] << 4
    return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)])


def unpack(packed: Tensor, shape: torch.Size, how: str) -> Tensor:
    """Return the fp32 values of `shape` that `pack` has made `packed` of, up to what was rounded away."""
    if how == "none":
        return packed.view(torch.float32).view(shape)
    if how == "bf16":
        return packed.view(torch.bfloat16).float().view(shape)
    numel = shape.numel()
    size = 2 * -(-numel // BLOCK)
    scales, codes = packed[:size].clone().view(torch.bfloat16).float(), packed[size:]
    if how == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=1).view(-1)[:numel].to(torch.int8) - 8
    else:
        codes = codes.view(torch.int8)
    return (codes.float() * scales.repeat_interleave(BLOCK)[:numel]).view(shape)

"""Proof that all ranks hold the same bytes: checksums over what forward reads.

A checksum here is a sum over elements, of their bits times an odd weight that depends on their index in
the whole tensor, modulo 2⁶⁴. So pieces of a tensor can be summed separately and the sums added: the same
number comes out of a whole tensor on one rank and of its pieces on many.
"""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.lowrank.wrap import is_lora_parameter
from relora_ds.zero.frozen_master import FrozenWeights, is_partitioned
from relora_ds.zero.partitions import partition_range
from relora_ds.zero.shards import ShardView

_CHUNK = 1 << 22  # elements at a time: the int64 products take 8 bytes each
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(piece: Tensor, start: int = 0) -> Tensor:
    """int64 scalar of a 1-D piece that begins at element `start` of its tensor; the pieces' checksums add up."""
    bits = piece.detach().contiguous().view(_BITS[piece.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=piece.device)
    for at in range(0, bits.numel(), _CHUNK):
        chunk = bits[at : at + _CHUNK].to(torch.int64, copy=True)
        first = 2 * (start + at) + 1
        total += chunk.mul_(torch.arange(first, first + 2 * chunk.numel(), 2, device=piece.device)).sum()
    return total


@torch.no_grad()
def verify(
    shards: ShardView, frozen: FrozenWeights, sent: dict[str, Tensor], *, device: torch.device, what: str = "restart"
) -> str:
    """Compare W, A and B over all ranks, as forward reads them; returns the common checksum. Collective.

    Where ranks hold whole tensors, each one's checksum must be the same everywhere. Where ZeRO-3 splits a
    tensor, the pieces' checksums must add up. Both must give what the owner of the weight sent. The masters
    of A and B must equal forward's copies.

    Args:
        sent: the checksums of the weights that this rank owns, taken before they were broadcast.
        what: an error is about.

    Raises:
        RuntimeError: naming the first tensor that differs.
    """
    names, sums, split = [], [], []
    for name in (n for n in shards.names if is_lora_parameter(n)):
        piece, start = shards.forward_copy(name)
        parameter = shards[name].parameter
        names.append(name)
        sums.append(checksum(piece, start))
        split.append(is_partitioned(parameter))
    stored: dict[str, Any] = {f"{name}.weight": layer.weight for name, layer in frozen.layers.items()}
    stored |= {f"{name}.lora_A": frozen.lowrank[name].lora_A for name in frozen.one_sided}
    for name, tensor in stored.items():
        start, stop = partition_range(tensor) if is_partitioned(tensor) else (0, tensor.numel())
        piece = tensor.ds_tensor.data[: stop - start] if is_partitioned(tensor) else tensor.data.reshape(-1)
        names.append(name)
        sums.append(checksum(piece, start))
        split.append(is_partitioned(tensor))
    own = torch.stack([s.to(device) for s in sums])
    whole = ~torch.tensor(split, device=device)

    total = own.clone()
    dist.all_reduce(total)  # wraps around, as the checksum itself does
    low, high = own.clone(), own.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    wrong = whole & (low != high)
    common = torch.where(whole, low, total)

    expected, known = torch.zeros_like(own), torch.zeros_like(own)
    for i, name in enumerate(names):
        owned = name.removesuffix(".weight")
        if owned in sent:
            expected[i], known[i] = sent[owned], 1
    dist.all_reduce(expected)
    dist.all_reduce(known)
    wrong |= (known > 0) & (expected != common)

    stale = torch.zeros_like(own)
    for i, name in enumerate(names):
        if is_lora_parameter(name) and name not in stored:
            stale[i] = _is_stale(shards, name)
    dist.all_reduce(stale)
    wrong |= stale > 0
    wrong, common = torch.stack([wrong.to(torch.int64), common]).cpu()
    if wrong.any():
        first = names[int(wrong.nonzero()[0])]
        raise RuntimeError(
            f"{what}: the ranks do not agree on {first}, or its master and stored copy differ; "
            "training cannot continue from here. Resume from the last checkpoint and report this"
        )
    return hashlib.sha256(common.numpy().tobytes()).hexdigest()[:16]


def _is_stale(shards: ShardView, name: str) -> Tensor:
    """Return whether this rank's master of a LoRA factor is not what forward reads: a bool scalar."""
    shard = shards[name]
    piece, start = shards.forward_copy(name)
    seen = piece[shard.start - start : shard.stop - start]
    return (shard.master.to(seen.device, seen.dtype) != seen).any()

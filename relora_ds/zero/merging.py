"""The merge of a restart: `W <- ρ·W + s·B·A`, or the mean of what islands add, on the owners of the weights.

Each owner merges one of its layers at a time, in fp32, and broadcasts the rounded copy. Before anything is overwritten,
all owners merge once for nothing. So what is not finite, or does not fit into memory, ends the restart on every rank.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.seeding import keyed_generator
from relora_ds.zero.collect import gather_factors
from relora_ds.zero.frozen_master import FrozenWeights, assign_owners
from relora_ds.zero.shards import ShardView
from relora_ds.zero.verify_ranks import checksum

_COPIES = 5  # of a layer's W in fp32: what `_merged` has alive at once, the stored copy among it
_FAILED = 2  # beside 1, not finite


class NonFiniteMergeError(RuntimeError):
    """A merged weight would not be finite. Nothing was changed."""


class Exchange(Protocol):
    """What islands make of their updates together; see `exchange.exchange`."""

    def swap(self, factors: Iterable[tuple[str, Tensor, Tensor]], sketches: Mapping[str, Tensor | None]) -> None:
        """Send this island's update and receive those of the others. Collective."""

    def update(self, name: str, base: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to add to a weight, and the squared norm of the mean of `s·B·A`."""

    def sketch(self, name: str) -> Tensor | None:
        """Return the mean of the islands' sketches of an owned layer."""

    def finish(self) -> None:
        """Exchange everything else that trains, and compare all weights. Collective."""


def peak_bytes(shapes: dict[str, torch.Size], r: int, *, stage: int, world_size: int) -> int:
    """Return what a restart needs on a rank's device for as long as it takes, at most.

    An exchange with other islands needs no more: a momentum of W is there while its stored copies are not.

    Args:
        shapes: of the weights that are merged into, by layer.
        r: the rank of their updates.
    """
    if not shapes:
        return 0
    factors = [0] * world_size  # between the look at a merge and the merge, in fp32
    if stage > 0 and world_size > 1:
        for name, owner in assign_owners({name: shape.numel() for name, shape in shapes.items()}, world_size).items():
            factors[owner] += 4 * r * sum(shapes[name].numel() // side for side in shapes[name][-2:])
    return _COPIES * 4 * max(shape.numel() for shape in shapes.values()) + max(factors)


def merge(
    shards: ShardView,
    frozen: FrozenWeights,
    rounds: list[list[str]],
    kept: dict[str, tuple[Tensor, Tensor]],
    exchange: Exchange | None,
    *,
    key: str,
    device: torch.device,
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Merge in rounds: every owner one of its layers, at the same time, which are then broadcast one after the other.

    kept: the factors of this rank's layers, where other ranks would have to send them again; used up. key: of rounding
    at random.

    Returns `[‖stored ΔW − intended ΔW‖², ‖intended ΔW‖², ‖s·B·A‖², ‖W‖²]` of every layer, then the ledger's sums of the
    first two over all restarts, the same on every rank; and the checksums of the stored copies that this rank sends.
    """
    squares = torch.zeros(len(frozen.lowrank), 6, dtype=torch.float64, device=device)  # a row is filled by its owner
    rows = dict(zip(frozen.lowrank, squares, strict=True))
    sent: dict[str, Tensor] = {}
    samples: dict[str, Tensor] = {}
    for names in rounds:
        factors = kept if shards.partitioned else _gather_factors(shards, frozen, names)
        stored: dict[str, Tensor] = {}
        for name in names:
            if (base := frozen.read(name, device)) is None:
                continue
            lora_A, lora_B = factors.pop(name)
            merged, stored[name], rows[name][:4], samples[name] = _merged(
                frozen, name, base, lora_A, lora_B, f"{key}/{name}.weight", exchange
            )
            frozen.keep(name, merged)
            del base, merged
            sent[name] = checksum(stored[name].reshape(-1))
        for name in names:
            frozen.publish(name, stored.pop(name, None), device)
    frozen.masters.settle()
    frozen.add_to_ledgers(samples)
    if samples:
        ledgers = [frozen.ledgers[name] for name in samples]
        sums = torch.stack([_square(value) for ledger in ledgers for value in (ledger.lost, ledger.intended)])
        for name, row in zip(samples, sums.view(-1, 2).to(device), strict=True):  # in one copy
            rows[name][4:] = row
    dist.all_reduce(squares)
    return dict(zip(frozen.lowrank, squares.tolist(), strict=True)), sent


def _merged(
    frozen: FrozenWeights,
    name: str,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    key: str,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge one layer on its owner, changing nothing but `base`, which is used up.

    key: of the rounding at random. exchange: has what is added instead of `s·B·A`.

    Returns the merged weight, its stored copy, `[‖stored ΔW − intended ΔW‖², ‖intended ΔW‖², ‖s·B·A‖², ‖W‖²]`, and the
    ledger's samples of the intended ΔW (s·B·A, and what weight decay takes) and of what of it was lost, `[2, n]`.
    `peak_bytes` counts the fp32 tensors of its size that are alive at once.
    """
    weight = _square(base)
    before = frozen.dequantize(name, frozen.quantize(base)) if frozen.with_masters else base
    if exchange is None:
        intended, update = _own_update(frozen.lowrank[name], base, lora_A, lora_B)
    else:
        intended, update = exchange.update(name, base, lora_A)
    change = _square(intended)
    merged = base.add_(intended) if frozen.with_masters else base + intended
    stored = frozen.quantize(merged, None if frozen.with_masters else keyed_generator(key, base.device))
    lost = torch.sub(frozen.dequantize(name, stored), before, out=before).sub_(intended)
    samples = torch.stack([*map(frozen.ledgers[name].sample, (intended, lost))])
    del intended
    return merged, stored, torch.stack([_square(lost), change, update, weight]), samples


def _own_update(layer: LowRankLayer, base: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return `s·B·A` with what weight decay takes of `base`, and `‖s·B·A‖²`."""
    intended = layer.add_update_(torch.zeros_like(base), lora_A, lora_B)
    update = _square(intended)
    if layer.decay is not None:
        intended.add_(base, alpha=layer.rho - 1)
    return intended, update


def _square(value: Tensor) -> Tensor:
    return value.square().sum(dtype=torch.float64)


def owned_factors(
    shards: ShardView, frozen: FrozenWeights, rounds: list[list[str]], kept: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield `(layer, A, B)` of this rank's layers, fp32. Collective: to the end on every rank."""
    for names in rounds:
        factors = kept if shards.partitioned else _gather_factors(shards, frozen, names)
        yield from ((name, *factors[name]) for name in names if name in factors)


def _gather_factors(shards: ShardView, frozen: FrozenWeights, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """fp32 `(A, B)` of those of the layers that this rank owns. Collective."""
    found = {name: gather_factors(shards, frozen, name, frozen.owners[name]) for name in names}
    return {name: factors for name, factors in found.items() if factors is not None}


def require_finite(
    shards: ShardView, frozen: FrozenWeights, rounds: list[list[str]], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Merge once for nothing: everything is read and multiplied twice, but there is no second copy of every weight.

    The largest layers are merged with all that belongs to it. So where a rank has no memory for a restart, all ranks
    end here, and not in a collective that one of them never comes to.

    Returns the factors of this rank's layers, where other ranks would have to send them again.
    """
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    rows = {name: row for row, name in enumerate(frozen.lowrank)}
    bad = torch.zeros(len(rows), dtype=torch.int32, device=device)
    failure = None
    for names in rounds:
        factors = _gather_factors(shards, frozen, names)
        for name in names:
            try:
                if (base := frozen.read(name, device)) is not None:
                    bad[rows[name]] = ~_can_merge(frozen, name, base, *factors[name], with_all=names is rounds[0])
            except RuntimeError as error:  # the other ranks wait for word
                failure = error
                bad[rows[name]] = _FAILED
        if shards.partitioned:
            kept |= factors
    dist.all_reduce(bad)
    found = dict(zip(frozen.lowrank, bad.tolist(), strict=True))
    if names := [name for name, code in found.items() if code == _FAILED]:
        raise RuntimeError(
            f"restart: rank {frozen.owners[names[0]]} could not merge {names[0]}; nothing was changed"
        ) from failure
    if names := [name for name, code in found.items() if code]:
        raise NonFiniteMergeError(
            f"restart: s·B·A merged into W would not be finite in {len(names)} of {len(found)} "
            f"layers, the first {names[0]}; nothing was changed"
        )
    return kept


def _can_merge(
    frozen: FrozenWeights, name: str, base: Tensor, lora_A: Tensor, lora_B: Tensor, *, with_all: bool
) -> Tensor:
    """Return whether the merged weight is finite in its stored copy: a bool scalar. Uses `base` up."""
    if with_all:
        return frozen.can_store(_merged(frozen, name, base, lora_A, lora_B, "")[0])
    return frozen.can_store(frozen.lowrank[name].merge_(base, lora_A, lora_B))

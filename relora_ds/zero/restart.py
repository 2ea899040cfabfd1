"""The restart, as one exact transaction over all shards (paper section 3, Algorithm 1).

    merge         W <- ρ·W + s·B·A, ρ <- 1, in fp32, on the rank that owns W, which broadcasts the rounded copy; between
                  islands W gets the mean of their updates (`Exchange`), and so does everything else that trains
    reinitialise  A <- Kaiming from (seed, restart number, name), or another basis (`zero.subspaces`), B <- 0: masters
                  and forward's copies
    prune         Adam moments of A and B, per tensor over all ranks; or turn B's into the new basis
    agree         checksums over W, A and B prove that all ranks hold the same

Before anything is overwritten, the owners make sure that what they would merge is finite.

Everything here is written against `ShardView` and `FrozenWeights` and knows no ZeRO stage.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.precision import exact_products
from relora_ds.lowrank.seeding import keyed_generator
from relora_ds.lowrank.wrap import is_lora_parameter
from relora_ds.zero.accelerator import now
from relora_ds.zero.collect import gather_factors
from relora_ds.zero.exact_gradients import ExactGradients
from relora_ds.zero.frozen_master import FrozenWeights, assign_owners
from relora_ds.zero.moments import prune_moments, rotate_moments
from relora_ds.zero.shards import ShardView
from relora_ds.zero.subspaces import Subspaces
from relora_ds.zero.traffic import count_traffic
from relora_ds.zero.verify_ranks import checksum, verify

_COPIES = 5  # of a layer's W in fp32: what `_merged` has alive at once, the stored copy among it
_FAILED = 2  # beside 1, not finite


class NonFiniteMergeError(RuntimeError):
    """A merged weight would not be finite. Nothing was changed."""


@dataclass(frozen=True)
class RestartReport:
    """What a restart did, the same on every rank.

    Attributes:
        t: applied optimizer steps when it took place.
        restarts: its number, counted from 1.
        prune_fraction_m, prune_fraction_v: realised fraction of pruned entries of the LoRA parameters'
            `exp_avg` and `exp_avg_sq`, over all ranks.
        merge_loss: ‖ΔW stored − ΔW intended‖ / ‖ΔW intended‖ over all layers.
        merge_loss_total: the same of the sums over all restarts since the weights are stored as they are now (of a
            sample of large layers' weights). With masters it falls, because the rounding of earlier merges is made
            good by later ones.
        merge_drift: ‖logits after − before‖ / ‖logits before‖ on the engine's probe; None without one.
        update_norms: ‖s·B·A‖, what was merged into W, by layer name (Frobenius).
        relative_update_norms: ‖s·B·A‖ / ‖W before the merge‖, by layer name.
        restart_s: seconds, the drift's two forwards not counted.
        subspace_s, subspace_bytes: seconds and payload of the new A's and of the turning of moments; part of the whole.
        checksum: over W, A and B, equal on all ranks.
    """

    t: int
    restarts: int
    prune_fraction_m: float
    prune_fraction_v: float
    merge_loss: float
    merge_loss_total: float
    merge_drift: float | None
    update_norms: dict[str, float]
    relative_update_norms: dict[str, float]
    restart_s: float
    subspace_s: float
    subspace_bytes: int
    checksum: str


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


@torch.no_grad()
def restart(
    shards: ShardView,
    frozen: FrozenWeights,
    config: ReLoRAConfig,
    *,
    t: int,
    number: int,
    seed: int,
    device: torch.device,
    probe: Callable[[], Tensor] | None = None,
    exact: ExactGradients | None = None,
    exchange: Exchange | None = None,
    own_seed: str | None = None,
) -> RestartReport:
    """Merge, reinitialise, prune, agree. Collective: every rank calls it between a step and the next forward.

    Args:
        number: of this restart, from 1; decides the values of the new `A`.
        exact: the gradients of the step before, where it took them along.
        exchange: with other islands.
        own_seed: decides the new A where both factors train, and islands have different ones; None: `seed`.
        probe: returns logits of some fixed batch; called before and after to measure the drift.

    Raises:
        NonFiniteMergeError: on every rank and before anything is overwritten, naming the layers.
        RuntimeError: when the ranks hold different bytes afterwards, naming the first tensor.
    """
    before = probe() if probe else None
    started = now(device)
    shards.drop_gathered_copies()
    rounds = frozen.rounds()
    kept = _require_finite(shards, frozen, rounds, device)
    subspaces = Subspaces(config, seed, number, device, exact, own_seed)
    if exchange is not None:
        exchange.swap(_owned_factors(shards, frozen, rounds, kept), subspaces.gradients(frozen))
    squares, sent = _merge(shards, frozen, rounds, kept, exchange, key=f"{seed}/{number}", device=device)
    if exchange is not None:
        exchange.finish()
    if frozen.decay is not None:
        frozen.set_decay(1.0)
    merged = now(device)
    rotates = config.optimizer_reset == "rotate"
    with count_traffic() as traffic:
        if exchange is None:
            gradients = subspaces.gradients(frozen)
        else:
            gradients = {name: exchange.sketch(name) if name in frozen.ledgers else None for name in frozen.layers}
        turns = _reinitialise(shards, frozen, subspaces, gradients, with_turns=rotates)
        if rotates:
            rotate_moments(shards, turns, frozen.owners)
    subspace_seconds = now(device) - merged
    fraction_m, fraction_v = prune_moments(
        shards,
        [n for n in shards.names if is_lora_parameter(n)],
        config.optimizer_reset,
        config.reset_ratio,
        seed=seed,
        number=number,
        device=device,
    )
    common = verify(shards, frozen, sent, device=device)
    seconds = now(device) - started
    drift = _relative_change(before, probe(), device) if probe and before is not None else None
    updates = {name: math.sqrt(update) for name, (_, _, update, *_) in squares.items()}
    relative = {name: _ratio(update, weight) for name, (_, _, update, weight, *_) in squares.items()}
    lost, intended, _, _, lost_so_far, intended_so_far = (sum(column) for column in zip(*squares.values(), strict=True))
    return RestartReport(
        t,
        number,
        fraction_m,
        fraction_v,
        _ratio(lost, intended),
        _ratio(lost_so_far, intended_so_far),
        drift,
        updates,
        relative,
        seconds,
        subspace_seconds,
        int(traffic.payload),
        common,
    )


def peak_bytes(shapes: dict[str, torch.Size], r: int, *, stage: int, world_size: int) -> int:
    """Return what a restart needs on a rank's device for as long as it takes, at most.

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


def _merge(
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
    squares = torch.zeros(len(frozen.layers), 6, dtype=torch.float64, device=device)  # a row is filled by its owner
    rows = dict(zip(frozen.layers, squares, strict=True))
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
    return dict(zip(frozen.layers, squares.tolist(), strict=True)), sent


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
        intended, update = _own_update(frozen.layers[name], base, lora_A, lora_B)
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


def _owned_factors(
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


def _require_finite(
    shards: ShardView, frozen: FrozenWeights, rounds: list[list[str]], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Merge once for nothing: everything is read and multiplied twice, but there is no second copy of every weight.

    The largest layers are merged with all that belongs to it. So where a rank has no memory for a restart, all ranks
    end here, and not in a collective that one of them never comes to.

    Returns the factors of this rank's layers, where other ranks would have to send them again.
    """
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    rows = {name: row for row, name in enumerate(frozen.layers)}
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
    found = dict(zip(frozen.layers, bad.tolist(), strict=True))
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
    return frozen.can_store(frozen.layers[name].merge_(base, lora_A, lora_B))


def _reinitialise(
    shards: ShardView,
    frozen: FrozenWeights,
    subspaces: Subspaces,
    gradients: dict[str, Tensor | None],
    *,
    with_turns: bool,
) -> dict[str, Tensor]:
    """Give every layer its new A, and B = 0. gradients: what bases are computed from, on the owners.

    Returns, if asked for, what turns B's moments from the old basis to the new one: `[..., r, r]` in fp32.
    """
    turns: dict[str, Tensor] = {}
    for name, new_A in subspaces.choose(frozen, gradients).items():
        if name in frozen.one_sided:
            old_A = frozen.read_A(name) if with_turns else None
            frozen.publish_A(name, new_A)
            if old_A is not None:
                with exact_products():
                    turns[name] = old_A @ frozen.read_A(name).mT
        else:
            shards.write(f"{name}.lora_A", subspaces.on_every_rank(new_A, name, frozen))
        shards.write(f"{name}.lora_B", torch.zeros(shards[f"{name}.lora_B"].shape, device=subspaces.device))
    return turns


def _ratio(square: float, of: float) -> float:
    """Return the quotient of two norms, from their squares; 0 where there is nothing to compare with."""
    return math.sqrt(square / of) if of > 0 else 0.0


def _relative_change(before: Tensor, after: Tensor, device: torch.device) -> float:
    squares = torch.stack(
        [
            (after.float() - before.float()).square().sum(dtype=torch.float64),
            before.float().square().sum(dtype=torch.float64),
        ]
    ).to(device)
    dist.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())

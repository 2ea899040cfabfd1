"""The restart, as one exact transaction over all shards (paper section 3, Algorithm 1).

    merge         W <- W + s·B·A, in fp32, on the rank that owns W; only the copy that it sends is rounded
    reinitialise  A <- Kaiming from (seed, restart number, name), B <- 0: masters and forward's copies
    prune         Adam moments of A and B, per tensor over all ranks
    agree         the owners broadcast W; checksums over W, A and B prove that all ranks hold the same

Before anything is overwritten, the owners make sure that what they would merge is finite.

Everything here is written against `ShardView` and `FrozenWeights` and knows no ZeRO stage.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.frozen import add_update_
from relora_ds.lowrank.linear import initial_A
from relora_ds.lowrank.reinit import dominant_rows, orthogonal_A
from relora_ds.lowrank.seeding import keyed_generator
from relora_ds.lowrank.wrap import is_lora_parameter
from relora_ds.zero.agreement import checksum, verify
from relora_ds.zero.frozen_master import FrozenWeights
from relora_ds.zero.moments import prune_moments
from relora_ds.zero.shards import ShardView


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
    checksum: str


@torch.no_grad()
def restart(shards: ShardView, frozen: FrozenWeights, config: ReLoRAConfig, *, t: int, number: int, seed: int,
            device: torch.device, probe: Callable[[], Tensor] | None = None) -> RestartReport:
    """Merge, reinitialise, prune, agree. Collective: every rank calls it between a step and the next forward.

    Args:
        number: of this restart, from 1; decides the values of the new `A`.
        probe: returns logits of some fixed batch; called before and after to measure the drift.

    Raises:
        NonFiniteMergeError: on every rank and before anything is overwritten, naming the layers.
        RuntimeError: when the ranks hold different bytes afterwards, naming the first tensor.
    """
    before = probe() if probe else None
    started = time.perf_counter()
    shards.drop_gathered_copies()
    squares, sent = _merge(shards, frozen, config, seed=seed, number=number, device=device)
    _reinitialise(shards, frozen, config, seed=seed, number=number, device=device)
    fraction_m, fraction_v = prune_moments(shards, [n for n in shards.names if is_lora_parameter(n)],
                                           config.optimizer_reset, config.reset_ratio,
                                           seed=seed, number=number, device=device)
    common = verify(shards, frozen, sent, device=device)
    seconds = time.perf_counter() - started
    drift = _relative_change(before, probe(), device) if probe else None
    updates = {name: math.sqrt(update) for name, (_, update, *_) in squares.items()}
    relative = {name: _ratio(update, weight) for name, (_, update, weight, *_) in squares.items()}
    lost, intended, _, lost_so_far, intended_so_far = (sum(column) for column in zip(*squares.values(), strict=True))
    return RestartReport(t, number, fraction_m, fraction_v, _ratio(lost, intended),
                         _ratio(lost_so_far, intended_so_far), drift, updates, relative, seconds, common)


def _merge(shards: ShardView, frozen: FrozenWeights, config: ReLoRAConfig, *, seed: int, number: int,
           device: torch.device) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Merge on the owners, all at the same time, then broadcast one weight after the other.

    Returns `[‖stored ΔW − s·B·A‖², ‖s·B·A‖², ‖W‖²]` of every layer, then the ledger's sums of the first two over all
    restarts, the same on every rank; and the checksums of the stored copies that this rank sends.
    """
    factors = _gather_factors(shards, frozen)
    _require_finite(frozen, factors, device)

    stored: dict[str, Tensor] = {}
    squares = torch.zeros(len(frozen.layers), 5, dtype=torch.float64, device=device)  # a row is filled by its owner
    for row, (name, layer) in zip(squares, frozen.layers.items(), strict=True):
        base = frozen.read(name, device)
        if base is None:
            continue
        stored_before = frozen.dequantize(name, frozen.quantize(base)) if frozen.with_masters else base
        intended = add_update_(torch.zeros_like(base), *factors.pop(name), layer.scaling)
        merged = base + intended
        generator = None if frozen.with_masters else keyed_generator(f"{seed}/{number}/{name}.weight", device)
        stored[name] = frozen.quantize(merged, generator)
        frozen.keep(name, merged)
        lost = frozen.dequantize(name, stored[name]) - stored_before - intended
        ledger = frozen.ledgers[name]
        ledger.add(intended, lost)
        for i, value in enumerate((lost, intended, base, ledger.lost, ledger.intended)):
            row[i] = value.square().sum(dtype=torch.float64)
    sent = {name: checksum(value.reshape(-1)) for name, value in stored.items()}
    for name in frozen.layers:
        frozen.publish(name, stored.pop(name, None), device)

    dist.all_reduce(squares)
    return dict(zip(frozen.layers, squares.tolist(), strict=True)), sent


def _gather_factors(shards: ShardView, frozen: FrozenWeights) -> dict[str, tuple[Tensor, Tensor]]:
    """fp32 `(A, B)` of the layers that this rank owns."""
    found: dict[str, Tensor] = {}
    for owner in range(dist.get_world_size()):
        names = [f"{name}.{factor}" for name, rank in frozen.owners.items() if rank == owner
                 for factor in ("lora_A", "lora_B")]
        found.update(shards.gather(names, dst=owner))
    return {name: (found[f"{name}.lora_A"], found[f"{name}.lora_B"]) for name in frozen.owned()}


def _require_finite(frozen: FrozenWeights, factors: dict[str, tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Merge once for nothing: everything is read and multiplied twice, but there is no second copy of every weight."""
    bad = torch.zeros(len(frozen.layers), dtype=torch.int32, device=device)
    for i, (name, layer) in enumerate(frozen.layers.items()):
        base = frozen.read(name, device)
        if base is not None:
            bad[i] = not frozen.can_store(add_update_(base, *factors[name], layer.scaling))
    dist.all_reduce(bad)
    if names := [name for name, is_bad in zip(frozen.layers, bad.tolist(), strict=True) if is_bad]:
        raise NonFiniteMergeError(f"restart: s·B·A merged into W would not be finite in {len(names)} of {len(bad)} "
                                  f"layers, the first {names[0]}; nothing was changed")


def _reinitialise(shards: ShardView, frozen: FrozenWeights, config: ReLoRAConfig, *, seed: int, number: int,
                  device: torch.device) -> None:
    for name, layer in frozen.layers.items():
        new_A = initial_A(layer.r, layer.in_features, seed=seed, restart=number, name=name)
        if config.restart_init != "kaiming":
            new_A = _chosen_A(new_A, name, frozen, config.restart_init, seed=seed, number=number, device=device)
        shards.write(f"{name}.lora_A", new_A)
        shards.write(f"{name}.lora_B", torch.zeros(layer.out_features, layer.r))


def _chosen_A(kaiming: Tensor, name: str, frozen: FrozenWeights, how: str, *, seed: int, number: int,
              device: torch.device) -> Tensor:
    """The owner's choice, the same bits on every rank: decompositions differ between kinds of processors."""
    layer, owner, chosen = frozen.layers[name], frozen.owners[name], None
    if how == "gradient" and layer.sketch is not None:  # a restart by hand comes without
        sketch, layer.sketch = layer.sketch.values, None
        dist.all_reduce(sketch)
        if dist.get_rank() == owner:
            chosen = dominant_rows(sketch, layer.r)
    elif how == "orthogonal" and dist.get_rank() == owner:
        chosen = orthogonal_A(layer.r, layer.in_features, seed=seed, restart=number, name=name)
    new_A = (kaiming if chosen is None else chosen).to(device)
    dist.broadcast(new_A, owner)
    return new_A


def _ratio(square: float, of: float) -> float:
    """The quotient of two norms, from their squares; 0 where there is nothing to compare with."""
    return math.sqrt(square / of) if of > 0 else 0.0


def _relative_change(before: Tensor, after: Tensor, device: torch.device) -> float:
    squares = torch.stack([(after.float() - before.float()).square().sum(dtype=torch.float64),
                           before.float().square().sum(dtype=torch.float64)]).to(device)
    dist.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())

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
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.precision import exact_products
from relora_ds.lowrank.wrap import is_lora_parameter
from relora_ds.zero.accelerator import now
from relora_ds.zero.exact_gradients import ExactGradients
from relora_ds.zero.frozen_master import FrozenWeights
from relora_ds.zero.merging import Exchange, merge, owned_factors, require_finite
from relora_ds.zero.moments import prune_moments, rotate_moments
from relora_ds.zero.shards import ShardView
from relora_ds.zero.subspaces import Subspaces
from relora_ds.zero.traffic import count_traffic
from relora_ds.zero.verify_ranks import verify


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
    kept = require_finite(shards, frozen, rounds, device)
    subspaces = Subspaces(config, seed, number, device, exact, own_seed)
    if exchange is not None:
        exchange.swap(owned_factors(shards, frozen, rounds, kept), subspaces.gradients(frozen))
    squares, sent = merge(shards, frozen, rounds, kept, exchange, key=f"{seed}/{number}", device=device)
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
            gradients = {name: exchange.sketch(name) if name in frozen.ledgers else None for name in frozen.lowrank}
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

"""Pruning of Adam moments that are split over ranks, and the size of the updates that they lead to."""

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.lowrank.moment_rotation import rotated
from relora_ds.lowrank.pruning import count_ties, keep_mask, kth_largest_magnitude, num_kept, random_mask
from relora_ds.lowrank.seeding import keyed_generator
from relora_ds.zero.shards import MOMENTS, Shard, ShardView


@torch.no_grad()
def prune_moments(
    shards: ShardView, names: list[str], how: str, reset_ratio: float, *, seed: int, number: int, device: torch.device
) -> tuple[float, float]:
    """Set the pruned entries of `exp_avg` and `exp_avg_sq` to 0, per tensor over all ranks. Collective.

    Args:
        how: "magnitude_joint" keeps the largest `1 - reset_ratio` of |exp_avg| and uses that mask for
            both moments; "magnitude" (the authors') gives each moment its own mask; "random" draws one
            joint mask from (seed, restart number, name); "zero" resets all; "none" and "rotate" keep all.

    Returns:
        The realised fractions of pruned entries of the first and of the second moment, over all ranks.
    """
    mine = [shards[name] for name in names]
    if how == "magnitude_joint":
        masks_m = masks_v = _magnitude_masks(shards, mine, "exp_avg", reset_ratio, device)
    elif how == "magnitude":
        masks_m = _magnitude_masks(shards, mine, "exp_avg", reset_ratio, device)
        masks_v = _magnitude_masks(shards, mine, "exp_avg_sq", reset_ratio, device)
    elif how == "random":
        masks_m = masks_v = [_random_mask(shard, reset_ratio, f"{seed}/{number}/{shard.name}") for shard in mine]
    elif how == "zero":
        masks_m = masks_v = [torch.zeros_like(shard.master, dtype=torch.bool) for shard in mine]
    elif how in ("none", "rotate"):
        masks_m = masks_v = [torch.ones_like(shard.master, dtype=torch.bool) for shard in mine]
    else:
        raise ValueError(f"relora.optimizer_reset: unknown value {how!r}")

    pruned = torch.zeros(2, dtype=torch.int64, device=device)
    for shard, mask_m, mask_v in zip(mine, masks_m, masks_v, strict=True):
        shard.exp_avg.keep(mask_m)
        shard.exp_avg_sq.keep(mask_v)
        if how != "magnitude" and not shard.exp_avg.is_view:
            # In 8 bit a small second moment is 0. Directly after a restart, when A has no gradient to refill it, the
            # step would be exp_avg / eps long.
            shard.exp_avg.keep(shard.exp_avg_sq.read() > 0)
        pruned += torch.stack([(~mask_m).sum(), (~mask_v).sum()]).to(device)
    if shards.partitioned:
        dist.all_reduce(pruned)
    total = sum(shard.numel for shard in mine)
    fraction_m, fraction_v = (number / total for number in pruned.tolist())
    return fraction_m, fraction_v


@torch.no_grad()
def rotate_moments(shards: ShardView, turns: dict[str, Tensor], owners: dict[str, int]) -> None:
    """Turn the moments of every `lora_B` in `turns` from its old basis to its new one. Collective.

    A piece may begin within a row of B, and the ranks' products may differ in their last bits. So the owner of the
    layer turns the whole tensor.

    Args:
        turns: by layer, `old A · new Aᵀ`, `[..., r, r]`, the same names on every rank.
        owners: the rank that turns a layer's.
    """
    for name, turn in turns.items():
        lora_B = f"{name}.lora_B"
        step, betas = shards.adam_of(lora_B)
        exp_avg, exp_avg_sq = (shards.gather([lora_B], what, dst=owners[name]).get(lora_B) for what in MOMENTS)
        turned = torch.empty(2, *shards[lora_B].shape, device=turn.device)
        if exp_avg is not None and exp_avg_sq is not None:
            turned = torch.stack(rotated(exp_avg, exp_avg_sq, turn, step=step, betas=betas))
        dist.broadcast(turned, owners[name])
        for what, value in zip(MOMENTS, turned, strict=True):
            shard = shards[lora_B]
            getattr(shard, what).write(shard.slice(value))


@torch.no_grad()
def max_update_over_lr(shards: ShardView, names: list[str], *, eps: float, device: torch.device) -> float:
    """max |Δp| / lr of the last Adam step, weight decay not counted, over the named parameters. Collective.

    Computed from the moments after the step (in 8 bit, where the second one is not rounded to 0). About 1 in ordinary
    training; it is where a reset that kept m and zeroed v shows (10⁵ was seen), before the loss does.
    """
    largest = torch.zeros((), device=device)
    for name in names:
        shard, (step, betas) = shards[name], shards.adam_of(name)
        if step > 0 and shard.exp_avg.numel():
            m = shard.exp_avg.read() / (1 - betas[0] ** step)
            v = shard.exp_avg_sq.read() / (1 - betas[1] ** step)
            update = m / (v.sqrt() + eps)
            if not shard.exp_avg_sq.is_view:  # rounded to 0 after the step, which it does not tell of then
                update = torch.where(v > 0, update, 0.0)
            largest = torch.maximum(largest, update.abs().max().to(device))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _magnitude_masks(
    shards: ShardView, mine: list[Shard], moment: str, reset_ratio: float, device: torch.device
) -> list[Tensor]:
    # On the device of the collectives: an offloaded optimizer keeps its moments on the host.
    values = [shard.read(moment).to(device) for shard in mine]
    keep = [num_kept(shard.numel, reset_ratio) for shard in mine]
    if not shards.partitioned:
        threshold, ties = kth_largest_magnitude(values, keep)
    else:
        threshold, ties = kth_largest_magnitude(values, keep, reduce=dist.all_reduce)
        # Ties go to the lowest flat index: subtract what the pieces before this one take. Every stage
        # hands out pieces in rank order.
        counts = torch.zeros(dist.get_world_size(), len(values), dtype=torch.int64, device=device)
        counts[dist.get_rank()] = torch.stack([count_ties(v, t) for v, t in zip(values, threshold, strict=True)])
        dist.all_reduce(counts)
        ties = (ties - counts[: dist.get_rank()].sum(0)).clamp(min=0)
    return [keep_mask(v, t, n) for v, t, n in zip(values, threshold, ties, strict=True)]


def _random_mask(shard: Shard, reset_ratio: float, key: str) -> Tensor:
    mask = random_mask(shard.numel, reset_ratio, keyed_generator(key))
    return shard.slice(mask).to(shard.master.device)

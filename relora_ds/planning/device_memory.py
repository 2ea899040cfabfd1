"""Bytes that one rank holds, by ZeRO stage: an itemised account of what is alive in a DeepSpeed 0.19 engine.

The items that are kept between steps, the gradients after backward and the copies at the optimizer step are checked
against the live tensors of real engines (tests/planning/test_device_memory.py). Sizes with T trainable and F frozen
weights, `e` bytes for one that trains, `f` bytes for one that is frozen (see `lowrank.formats`), n ranks:

    stage 0     eT + fF weights, 8T moments; in 16 bit 4T masters
    stage 1, 2  eT + fF weights, 12T/n masters and moments
    stage 3     (eT + fF)/n weights, 12T/n masters and moments, eT/n gradients, one reduce bucket, small parameters
                whole; fF where frozen weights are replicated

With `optim.name: adamw_8bit` moments are 2T and a 32nd of that, instead of 8T, but for embeddings.
Stored below fp32, ReLoRA's frozen weights have 4F/n of masters, on the host or the device. With
`relora.residual_every`, and where owners update them in every step, each rank has sums of all their gradients, 4F.
With `method: sst` each rank has all singular vectors and values too, 8F where weights are square, and in a step what
trains of them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from relora_ds.config import Recipe, ReLoRAConfig
from relora_ds.lowrank.frozen import MergeLedger
from relora_ds.planning.network import Shapes
from relora_ds.planning.planned_storage import ELEMENT_SIZE, PlannedStorage, gathered_by_stage_3, storage_of
from relora_ds.zero import ds_keys, ds_resolve
from relora_ds.zero.frozen_master import assign_owners
from relora_ds.zero.optimizers import moment_bytes

MASTER, MOMENTS = 4, 8  # bytes per element: fp32, and exp_avg with exp_avg_sq

DEVICE, HOST = "device", "host"
KEPT = "kept"  # alive between steps
BACKWARD = "backward"  # besides, at most, while backward runs
OPTIMIZER = "optimizer"  # besides, at most, while the optimizer steps
UPDATE = "update"  # besides, at most, while owners update frozen weights
RESTART = "restart"  # besides, at most, while a restart merges


@dataclass(frozen=True)
class Item:
    """`size` bytes on one rank: what, on the device or the host, and when."""

    what: str
    size: int
    where: str = DEVICE
    when: str = KEPT


def total(items: list[Item], where: str, *when: str) -> int:
    """Bytes of the items at `where` in the given moments."""
    return sum(item.size for item in items if item.where == where and item.when in when)


def peak(items: list[Item], activations: int = 0) -> int:
    """Bytes on the device at the highest summit: backward, with its activations, optimizer, update, or restart."""
    return total(items, DEVICE, KEPT) + max(
        total(items, DEVICE, BACKWARD) + activations,
        *(total(items, DEVICE, when) for when in (OPTIMIZER, UPDATE, RESTART)),
    )


def at_stage(deepspeed: dict, stage: int) -> dict:
    """Return the DeepSpeed configuration at another stage; offloading that does not exist there is left out."""
    zero = {**deepspeed.get("zero_optimization", {}), "stage": stage}
    if stage < 3:
        zero.pop("offload_param", None)
    if stage < 1:
        zero.pop("offload_optimizer", None)
    return {**deepspeed, "zero_optimization": zero}


def zero_section(
    recipe: Recipe, deepspeed: dict, shapes: Shapes, *, precision: str, accumulation: int, world_size: int
) -> dict:
    """DeepSpeed's `zero_optimization` as the engine will get it: every "auto" filled in."""
    resolved = ds_resolve.resolve(
        {
            **deepspeed,
            "train_batch_size": ds_keys.AUTO,
            "train_micro_batch_size_per_gpu": ds_keys.AUTO,
            "gradient_accumulation_steps": ds_keys.AUTO,
        },  # another world size may be asked about than they are for
        precision=precision,
        micro_batch_size=recipe.train.micro_batch_size,
        accumulation=accumulation,
        world_size=world_size,
        max_grad_norm=recipe.optim.max_grad_norm,
        num_trainable=shapes.num_trainable,
    )
    return resolved["zero_optimization"]


def state(
    shapes: Shapes, zero: dict, relora: ReLoRAConfig | None, *, precision: str, world_size: int, accumulation: int
) -> list[Item]:
    """Return what the rank with the most of it holds, without activations.

    Args:
        zero: a resolved `zero_optimization` section.
        relora: of the method, or None: nothing is merged, and frozen weights have no masters.
    """
    stage, e = zero["stage"], ELEMENT_SIZE[precision]
    storage = storage_of(shapes, relora, precision=precision, stage=stage)
    if stage == 0:
        items = _stage_0(shapes, storage, e)
    elif stage < 3:
        items = _stage_1_and_2(shapes, storage, zero, e, world_size, accumulation)
    else:
        items = _stage_3(shapes, storage, zero, e, world_size)
    if storage.with_masters and relora is not None:
        items.append(
            Item(
                "fp32 masters of the frozen weights",
                masters_bytes(shapes, world_size),
                HOST if relora.frozen_master == "cpu" else DEVICE,
            )
        )
    if relora is not None and (relora.residual_every is not None or shapes.owner_state):
        sums = MASTER * sum(shape.numel() for shape in shapes.merged.values())
        items.append(Item("sums of the frozen weights' gradients", sums))
    if shapes.owner_state:
        held = most_owned(shapes, world_size, lambda name: shapes.owner_state[name] + shapes.owner_kept[name])
        items.append(Item("state of the owners", held))
        items.append(Item("factors of the frozen weights", sum(shapes.shared_factors.values())))
        projected = most_owned(shapes, world_size, lambda name: shapes.factors_sent.get(name, 0))
        items.append(Item("projected gradients", projected, DEVICE, OPTIMIZER))
    ledgers = most_owned(shapes, world_size, lambda name: _ledger_bytes(shapes.merged[name].numel()))
    items.append(Item("ledgers of the merges", ledgers, HOST))
    return [item for item in items if item.size]


def _stage_0(shapes: Shapes, storage: PlannedStorage, e: int) -> list[Item]:
    trainable = shapes.num_trainable
    below_fp32 = e < MASTER  # in fp32 the optimizer steps the parameters themselves
    return [
        *_weights(e * trainable, storage.num_bytes, DEVICE),
        Item("fp32 masters of what trains", MASTER * trainable * below_fp32),
        Item("Adam's moments", _moments(shapes, shapes.groups)),
        Item("gradients", e * trainable, when=BACKWARD),
        Item("gradients", e * trainable, when=OPTIMIZER),
        Item("fp32 copies of the gradients", MASTER * trainable * below_fp32, when=OPTIMIZER),
    ]


def _stage_1_and_2(
    shapes: Shapes, storage: PlannedStorage, zero: dict, e: int, world_size: int, accumulation: int
) -> list[Item]:
    groups = [share(sum(group), world_size) for group in shapes.groups]
    mine, trainable = sum(groups), shapes.num_trainable
    offloaded = _device_of(zero, "offload_optimizer") == HOST
    # Stage 1 accumulates whole gradients and reduces them once; stage 2 keeps only its own from the first on.
    whole = e * trainable if zero["stage"] == 1 and accumulation > 1 else 0
    items = [
        *_weights(e * trainable, storage.num_bytes, DEVICE),
        *_optimizer_state(mine, _moments(shapes, [[size] for size in groups]), HOST if offloaded else DEVICE),
        Item("gradients", whole or (0 if offloaded else e * mine), when=BACKWARD),
        Item("reduce buckets", e * zero["reduce_bucket_size"] * (2 if zero.get("overlap_comm") else 1), when=BACKWARD),
    ]
    if not offloaded:
        return items + [
            Item("gradients", e * mine, when=OPTIMIZER),
            # One group after the other is unscaled, clipped and stepped.
            Item("fp32 copies of the gradients", MASTER * max(groups), when=OPTIMIZER),
        ]
    largest = max(map(max, shapes.groups))
    if accumulation > 1 and zero["stage"] == 2:
        items.append(Item("accumulated gradients", e * mine, HOST))
    return items + [
        Item("fp32 gradients of the offloaded optimizer", MASTER * mine, HOST),
        Item("buffers of the offloaded optimizer", e * (mine + largest), HOST),
        Item("buffers of the offloaded optimizer", e * largest),
    ]


def _stage_3(shapes: Shapes, storage: PlannedStorage, zero: dict, e: int, world_size: int) -> list[Item]:
    groups = [sum(share(size, world_size) for size in group) for group in shapes.groups]
    mine = sum(groups)
    frozen = sum(s.element_size * share(s.numel, world_size) for s in storage.all if s.sharded)
    gathered = gathered_by_stage_3(shapes, storage, zero, e)
    # What may be alive at once is counted in elements, of one byte or of several.
    live = min(1.0, int(zero["stage3_max_live_parameters"]) / max(1, gathered.elements))
    optimizer, weights = _device_of(zero, "offload_optimizer"), _device_of(zero, "offload_param")
    largest_group = min(
        max(share(sum(group), world_size) for group in shapes.groups), int(zero.get("sub_group_size", 1_000_000_000))
    )
    items = [
        *_weights(e * mine, frozen, weights),
        Item("frozen weights", storage.num_bytes - storage.sharded_bytes),
        Item("small parameters, whole", gathered.small_bytes),
        *_optimizer_state(mine, _moments(shapes, [[size] for size in groups]), optimizer),
        Item("gradients", e * mine, optimizer),
        Item("reduce bucket", e * zero["reduce_bucket_size"]),
        Item("gathered weights", int(live * gathered.num_bytes), when=BACKWARD),
    ]
    if optimizer == HOST:
        return items + [Item("fp32 gradients of the offloaded optimizer", MASTER * mine, HOST)]
    return items + [Item("fp32 copies of the gradients", MASTER * largest_group, when=OPTIMIZER)]


def _weights(trainable: int, frozen: int, where: str) -> list[Item]:
    return [Item("weights that train", trainable, where), Item("frozen weights", frozen, where)]


def _optimizer_state(mine: int, moments: int, where: str) -> list[Item]:
    return [Item("fp32 masters of what trains", MASTER * mine, where), Item("Adam's moments", moments, where)]


def _moments(shapes: Shapes, flats: Sequence[Sequence[int]]) -> int:
    """Return the bytes of Adam's moments. flats: of each group, the sizes of the tensors that the optimizer steps."""
    in_8_bit = shapes.in_8_bit or (False,) * len(flats)
    return sum(
        moment_bytes(size) if short else MOMENTS * size
        for group, short in zip(flats, in_8_bit, strict=True)
        for size in group
    )


def _device_of(zero: dict, key: str) -> str:
    return HOST if (zero.get(key) or {}).get("device") == "cpu" else DEVICE


def share(size: int, world_size: int) -> int:
    """One rank's piece, padded."""
    return -(-size // world_size)


def masters_bytes(shapes: Shapes, world_size: int) -> int:
    """fp32 masters of frozen weights, of the rank that has most."""
    return most_owned(shapes, world_size, lambda name: MASTER * shapes.merged[name].numel())


def most_owned(shapes: Shapes, world_size: int, num_bytes: Callable[[str], int]) -> int:
    """Bytes of the rank that has most, where the owner of the frozen weight of a layer has `num_bytes(layer)`."""
    load, sizes = [0] * world_size, {name: shape.numel() for name, shape in shapes.merged.items()}
    for name, owner in assign_owners(sizes, world_size).items():
        load[owner] += num_bytes(name)
    return max(load)


def _ledger_bytes(numel: int) -> int:
    with torch.device("meta"):
        ledger = MergeLedger(numel)
    return ledger.intended.nbytes + ledger.lost.nbytes

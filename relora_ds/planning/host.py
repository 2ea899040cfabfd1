"""Bytes of the host's memory that a rank takes at certain moments, besides what it keeps there.

Over all ranks of a run it is one fp32 copy of the network at the phase transition, and one of its frozen weights
where a restart, or a step of their owners, comes while a checkpoint is still being written. Weights that transformers
has to convert as it loads them are read whole by one rank, which is not counted here.
"""

from relora_ds.config import ReLoRAConfig
from relora_ds.planning.device_memory import HOST, MASTER, MOMENTS, RESTART, Item, masters_bytes, most_owned, share
from relora_ds.planning.network import Shapes
from relora_ds.planning.planned_storage import PlannedStorage

BUILD = "build"  # of an engine
TRANSITION = "switch"  # from the warm start; the word is a key of `estimate --json`
CHECKPOINT = "checkpoint"  # from the first one on, what is trained; until it is written, what is frozen
HOST_MOMENTS = (BUILD, TRANSITION, RESTART, CHECKPOINT)


def moment_name(moment: str) -> str:
    """Return what a moment is called in tables."""
    return "phase transition" if moment == TRANSITION else moment


def moments(
    shapes: Shapes, storage: PlannedStorage, relora: ReLoRAConfig | None, *, world_size: int, after_warm_start: bool
) -> list[Item]:
    """Return what the rank with the most of it holds on the host for a while."""
    largest = max([*map(max, shapes.groups), *shapes.frozen, *(shape.numel() for shape in shapes.merged.values())])
    items = [
        Item("a whole tensor as it is read", MASTER * largest, HOST, BUILD),
        *(
            Item("copies of masters and moments", (MASTER + MOMENTS) * _mine(shapes, world_size), HOST, when)
            for when in (RESTART, CHECKPOINT)
        ),
    ]
    if after_warm_start:
        weights = shapes.num_trainable - sum(shapes.trained_factors) + shapes.num_frozen - sum(shapes.bases.values())
        items += [
            Item("fp32 weights of the warm start", share(MASTER * weights, world_size), HOST, TRANSITION),
            Item("a whole tensor as it is read", MASTER * largest, HOST, TRANSITION),
        ]
    if relora is not None and relora.restart_init == "gradient" and relora.gradient_estimate == "exact":
        gradients = most_owned(shapes, world_size, lambda name: MASTER * shapes.merged[name].numel())
        items += [Item("exact gradients of the frozen weights", gradients, HOST, RESTART)]
    if relora is not None and relora.residual_every is not None:
        sums = most_owned(shapes, world_size, lambda name: MASTER * shapes.merged[name].numel())
        items += [Item("sums of the frozen weights' gradients", sums, HOST, CHECKPOINT)]
    if shapes.owner_state:
        state = most_owned(
            shapes, world_size, lambda name: shapes.owner_state[name] + shapes.shared_factors.get(name, 0)
        )
        items += [Item("copies of the owners' state", state, HOST, CHECKPOINT)]
    masters = masters_bytes(shapes, world_size) if storage.with_masters else 0
    if masters and relora is not None and relora.frozen_master == "cpu":
        when = CHECKPOINT if shapes.owner_state else RESTART  # owners write new ones at the next step
        items.append(Item("masters that a checkpoint is written from", masters, HOST, when))
    elif shapes.merged:
        stored = most_owned(shapes, world_size, lambda name: storage.merged[name].num_bytes)
        items.append(Item("copies of the frozen weights", masters or stored, HOST, CHECKPOINT))
    return items


def _mine(shapes: Shapes, world_size: int) -> int:
    return sum(share(sum(group), world_size) for group in shapes.groups)

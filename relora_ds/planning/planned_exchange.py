"""What exchanges between islands cost: bytes that are sent, and the host's memory."""

from collections import Counter

from relora_ds.config import IslandsConfig, ReLoRAConfig
from relora_ds.exchange.compress import num_bytes
from relora_ds.lowrank.reinit import sketch_shape
from relora_ds.planning.device_memory import HOST, MASTER, RESTART, Item
from relora_ds.planning.host import CHECKPOINT
from relora_ds.planning.network import Shapes
from relora_ds.zero.frozen_master import assign_owners


def exchange_bytes(shapes: Shapes, relora: ReLoRAConfig | None, islands: IslandsConfig) -> int:
    """Return what all ranks of an island together send, and receive of each other island.

    Factors that train and everything else that trains are made as small as `islands` says. Where the next basis comes
    from the gradient its sketch goes too, in fp32; not in the last exchange of a phase, which no cycle follows.
    """
    (size,) = _update_bytes(shapes, relora, islands, 1)
    return size


def exchange_items(
    shapes: Shapes, relora: ReLoRAConfig | None, islands: IslandsConfig, *, world_size: int
) -> list[Item]:
    """Return the host memory for the exchanges of an island, on the rank that needs most.

    An exchange is counted as a part of the restart, also of a full-rank run: all islands' updates of what this rank
    owns. A checkpoint is written from copies of what is kept.
    """
    assert islands.count is not None
    anchors = [0] * world_size
    for size, owner in _rest(shapes, world_size):
        anchors[owner] += MASTER * size
    momenta = anchors.copy()
    merged = {name: shape.numel() for name, shape in shapes.merged.items()}
    for name, owner in assign_owners(merged, world_size).items():
        momenta[owner] += MASTER * merged[name]
    kept = {
        "anchors of the exchanges": max(anchors),
        "momenta of the outer optimizer": max(momenta) if islands.outer[1] else 0,
        "errors of the compression": max(anchors) if islands.compress != "none" else 0,
    }
    updates = islands.count * max(_update_bytes(shapes, relora, islands, world_size))
    items = [
        *(Item(what, size, HOST) for what, size in kept.items()),
        *(
            Item("copies of anchors, momenta and errors", sum(kept.values()), HOST, when)
            for when in (RESTART, CHECKPOINT)
        ),
        Item("updates of all islands", updates, HOST, RESTART),
    ]
    return [item for item in items if item.size]


def _update_bytes(shapes: Shapes, relora: ReLoRAConfig | None, islands: IslandsConfig, world_size: int) -> list[int]:
    """Return the bytes that each rank sends in an exchange, and receives of each other island."""
    sent = [0] * world_size
    for size, owner in _rest(shapes, world_size):
        sent[owner] += num_bytes(size, islands.compress)
    factors = dict(zip(shapes.merged, shapes.factors, strict=True))
    owners = assign_owners({name: shape.numel() for name, shape in shapes.merged.items()}, world_size)
    for name, (in_A, in_B) in factors.items():
        for size in (in_B,) if shapes.bases else (in_A, in_B):
            sent[owners[name]] += num_bytes(size, islands.compress_factors)
        if relora is not None and relora.restart_init == "gradient":
            sent[owners[name]] += 4 * sketch_shape(relora.r, in_A // relora.r).numel()
    return sent


def _rest(shapes: Shapes, world_size: int) -> list[tuple[int, int]]:
    """Return `(elements, owner)` of everything that trains and is no factor."""
    rest = Counter(size for group in shapes.groups for size in group) - Counter(shapes.trained_factors)
    sizes = {str(number): size for number, size in enumerate(rest.elements())}
    return [(sizes[name], owner) for name, owner in assign_owners(sizes, world_size).items()]

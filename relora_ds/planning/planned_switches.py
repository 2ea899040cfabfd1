"""What switches of rows of A and columns of B cost (`zero.switches`): bytes on the wire, and of a rank."""

from relora_ds.config import SwitchLoRAConfig
from relora_ds.lowrank.switching import interval
from relora_ds.planning.device_memory import DEVICE, HOST, KEPT, OPTIMIZER, Item, most_owned, share
from relora_ds.planning.host import CHECKPOINT
from relora_ds.planning.network import Shapes
from relora_ds.zero.vectors import CHUNK, COPIES

_SAMPLES = 1000  # of the steps of a run


def switch_bytes(
    shapes: Shapes, r: int, switching: SwitchLoRAConfig, *, total_steps: int, stage: int, world_size: int
) -> tuple[float, float]:
    """`(payload, wire)` of an optimizer step, on average over the run; the comparison of ranks is left out.

    A switch brings every rank the candidate in fp32 and, where masters are split (stages 1 to 3), the vector that it
    replaces and its counterpart.
    """
    steps = range(0, total_steps, max(1, total_steps // _SAMPLES))
    switches = sum(r / interval(t, total_steps, first=switching.interval, ratio=switching.ratio) for t in steps)
    sides = sum(sum(shape[-2:]) for shape in shapes.merged.values())
    payload = 4 * sides * (3 if stage else 1) * switches / len(steps)
    return payload, 2 * payload * (world_size - 1) / world_size


def switch_items(shapes: Shapes, *, stage: int, world_size: int) -> list[Item]:
    """Return what the rank with the most of it holds: candidates, and which vector each element belongs to."""

    def candidates(name: str) -> int:
        sides = shapes.merged[name][-2:]
        return 4 * sum(sides) * min(sides)

    held, factors = most_owned(shapes, world_size, candidates), sum(shapes.trained_factors)
    mine = factors if stage == 0 else share(factors, world_size)
    return [
        Item("candidates of the switches", held, HOST, KEPT),
        Item("copies of the candidates", held, HOST, CHECKPOINT),
        Item("numbers of A's rows and B's columns", 4 * mine, DEVICE, KEPT),
        Item("a step of Adam by vector", 4 * COPIES * min(CHUNK, mine), DEVICE, OPTIMIZER),
    ]

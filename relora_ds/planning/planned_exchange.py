"""The bytes of an exchange between islands."""

from collections import Counter

from relora_ds.config import ReLoRAConfig
from relora_ds.exchange.compress import num_bytes
from relora_ds.lowrank.reinit import sketch_shape
from relora_ds.planning.network import Shapes


def exchange_bytes(shapes: Shapes, relora: ReLoRAConfig | None, compression: str) -> int:
    """Return what all ranks of an island together send, and receive of each other island.

    Factors that train go in fp32, and everything else that trains as `compression` makes it. Where the next basis comes
    from the gradient its sketch goes too; not in the last exchange of a phase, which no cycle follows.
    """
    rest = Counter(size for group in shapes.groups for size in group) - Counter(shapes.trained_factors)
    sent = 4 * sum(shapes.trained_factors) + sum(num_bytes(size, compression) for size in rest.elements())
    if relora is not None and relora.restart_init == "gradient":
        sent += sum(4 * sketch_shape(relora.r, in_A // relora.r).numel() for in_A, _ in shapes.factors)
    return sent

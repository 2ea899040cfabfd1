"""What every method costs on one network, from the plan that `check` and `estimate` show."""

import math

from relora_ds.config.names import METHODS
from relora_ds.planning.cost import Cost, cost
from relora_ds.planning.device_memory import DEVICE, HOST, KEPT, total
from relora_ds.planning.network import network_of
from relora_ds.training.phases import phases_of
from relora_ds.training.preflight import resolve
from relora_ds.utils.text import human_bytes, human_count

SIZE, RANKS = "llama_130m", 8
STAGES = {"stage 0": (0,), "stages 1 and 2": (1, 2), "stage 3": (3,)}
# A short warm start or none: what is shown is the last phase.
CHANGES = ["precision=bf16", "train.batch_sequences=512", "train.micro_batch_size=64"]


def markdown() -> str:
    """Return the table."""
    kept = [f"kept on a device, {stages}" for stages in STAGES]
    heads = ["recipe", "trains", "sent by a rank in a step, stage 1", *kept, "kept on its host, stages 1 and 2"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *map(_row, METHODS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(method: str) -> list[str]:
    resolved = resolve(f"{SIZE}_{method}", CHANGES, RANKS, to_run=False)
    phase, (config, _) = phases_of(resolved.recipe)[-1], network_of(resolved.recipe)
    found = {stage: cost(resolved, phase.method, config, stage=stage) for stage in range(4)}
    shapes, step = found[1].shapes, found[1].step
    assert step is not None, "the batch is a multiple of the ranks"
    return [
        f"`{SIZE}_{method}`",
        human_count(shapes.num_trainable + shapes.num_owned),
        human_bytes(math.ceil(step[1])),
        *(_kept(found, stages, DEVICE) for stages in STAGES.values()),
        _kept(found, (1, 2), HOST),
    ]


def _kept(found: dict[int, Cost], stages: tuple[int, ...], where: str) -> str:
    """Return what is kept between steps, which must be the same at all of `stages`."""
    (kept,) = {total(found[stage].items, where, KEPT) for stage in stages}
    return human_bytes(kept)

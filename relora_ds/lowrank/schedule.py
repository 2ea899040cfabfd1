"""The learning rate: warm-up, a curve, and a ramp after every restart (paper Figure 2, there with a cosine).

Pure functions of the step. `k` is the number of applied optimizer steps so far, so `lr_multiplier(k)`
is what update number `k + 1` uses.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

from relora_ds.config.curve import SCHEDULES, decay_length
from relora_ds.config.rules import choice


def scheduled_restarts(total_steps: int, restart_every: int | None) -> list[int]:
    """Return the steps after which a restart is due: every multiple of `restart_every` in (0, total_steps)."""
    return list(range(restart_every, total_steps, restart_every)) if restart_every else []


def lr_multiplier(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    restart_every: int | None = None,
    restart_warmup_steps: int = 0,
    min_lr_ratio: float = 0.0,
    schedule: str = "cosine",
    decay_steps: int | None = None,
    restarts: Sequence[int] | None = None,
) -> float:
    """Return the factor on the base learning rate for update number `step + 1`.

    Linear over `warmup_steps`, then the curve of `schedule`; after a restart at L, a linear ramp from 0 over
    `restart_warmup_steps` to the value that the curve has at the ramp's end.

    Args:
        step: applied optimizer steps so far, `0 ≤ step`; past `total_steps` the curve stays at its end.
        total_steps, warmup_steps, min_lr_ratio: of the curve, which ends at `min_lr_ratio`.
        schedule: "cosine" and "linear" fall from 1, where the warm-up ends, to `min_lr_ratio`; "wsd" (warm-up, stable,
            decay) stays at 1 and falls linearly over its last `decay_steps`; "constant" stays at 1 to the end.
        decay_steps: of wsd; None = a tenth of `total_steps`.
        restart_every, restart_warmup_steps: applied steps between restarts (None = there are none), and of the ramp.
        restarts: the ascending steps at which restarts took place. Default: the schedule's own,
            `scheduled_restarts(total_steps, restart_every)`. A running engine passes the list that it
            records, so that learning rate and merges cannot drift apart.

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: `step` is below 0; `schedule` is unknown.
    """
    if step < 0:
        raise ValueError(f"step: {step} is below 0; count applied steps from 0")
    if found := choice("schedule", schedule, SCHEDULES):
        raise ValueError(found)
    fall_begins = total_steps - decay_length(total_steps, decay_steps) if schedule == "wsd" else warmup_steps

    def base(k: int) -> float:
        if k < warmup_steps:
            return k / warmup_steps
        if schedule == "constant" or k < fall_begins:
            return 1.0
        progress = min(1.0, (k - fall_begins) / max(1, total_steps - fall_begins))
        left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
        return min_lr_ratio + (1 - min_lr_ratio) * left

    if restarts is None:  # the last one of the schedule, without the list of all
        last = max(0, min(step, total_steps - 1)) // restart_every * restart_every if restart_every else 0
    else:
        num_past = bisect_right(restarts, step)
        last = restarts[num_past - 1] if num_past else 0
    if last and step - last < restart_warmup_steps:
        return (step - last) / restart_warmup_steps * base(last + restart_warmup_steps)
    return base(step)

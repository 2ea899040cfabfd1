"""What a person wants to know of a run that trains: how far it is, how fast, how well, and whether it still lives."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from relora_ds.watch.followed_run import FollowedRun

WINDOW = 50  # newest logged steps that speeds and losses are taken over
SILENT_S = 60.0  # at least, before a run that logs nothing is called silent
SILENT_LINES = 10  # intervals between its lines, likewise


@dataclass(frozen=True)
class Progress:
    """A run at one moment. None is what is not known yet.

    Attributes:
        state: of status.json; "silent" where it says "running" and nothing was logged for long, "dead" where its
            process is gone, "not begun" before there is one.
        why: what to know of the state.
        step, total_steps: optimizer steps.
        loss: of training, the mean of the newest logged steps.
        val_loss: of the newest evaluation.
        tokens_per_s: the median of the newest logged steps.
        left_s: seconds until the last step, at the pace of the newest ones, with their evaluations and restarts.
        silent_s: seconds since it has logged something.
        restarts: so far.
        sent, full_rank: bytes that a rank has sent, and would have sent at full rank.
    """

    state: str
    why: str
    step: int
    total_steps: int | None
    loss: float | None
    val_loss: float | None
    tokens_per_s: float | None
    left_s: float | None
    silent_s: float | None
    restarts: int
    sent: float
    full_rank: float


def progress_of(run: FollowedRun, now: float | None = None) -> Progress:
    """Return how a run is doing. now: seconds since the epoch."""
    now = time.time() if now is None else now
    train, evaluations = run.lines["train"], run.lines["eval"]
    newest = train[-WINDOW:]
    losses = [line["loss"] for line in newest if line.get("loss") is not None]
    speeds = [line["tokens_per_s"] for line in newest if line.get("tokens_per_s")]
    step = max([run.status.get("step") or 0, *(lines[-1]["step"] for lines in run.lines.values() if lines)])
    total = None if run.recipe is None else run.recipe.total_steps
    state, why, silent_s = _state(run, now)
    pace = _seconds_per_step(newest)
    is_running = state in ("running", "silent")
    return Progress(
        state=state,
        why=why,
        step=step,
        total_steps=total,
        loss=statistics.mean(losses) if losses else None,
        val_loss=evaluations[-1].get("val_loss") if evaluations else None,
        tokens_per_s=statistics.median(speeds) if speeds else None,
        left_s=None if pace is None or total is None or not is_running else max(0, total - step) * pace,
        silent_s=silent_s,
        restarts=len(run.lines["restart"]),
        sent=(train[-1].get("total_bytes_wire") or 0.0) if train else 0.0,
        full_rank=(train[-1].get("full_rank_bytes_wire") or 0.0) if train else 0.0,
    )


def _state(run: FollowedRun, now: float) -> tuple[str, str, float | None]:
    state, why = run.status.get("state", "not begun"), run.status.get("reason", "")
    times = sorted(line["time"] for lines in run.lines.values() for line in lines[-WINDOW:] if "time" in line)
    last = max([*times[-1:], *([run.status["time"]] if "time" in run.status else [])], default=None)
    silent_s = None if last is None else max(0.0, now - last)
    if state == "running" and silent_s is not None:
        if run.lost_process:
            return "dead", f"{run.lost_process}, which trained it, is gone; resume=auto continues it", silent_s
        usual = statistics.median(b - a for a, b in zip(times, times[1:], strict=False)) if len(times) > 2 else 0.0
        if silent_s > max(SILENT_S, SILENT_LINES * usual):
            return "silent", f"nothing was logged for {duration(silent_s)}", silent_s
    return state, why, silent_s


def _seconds_per_step(newest: list[dict]) -> float | None:
    """Return the pace of logged steps by the clock, without pauses in which the run was not there."""
    pairs = [
        (b["step"] - a["step"], b["time"] - a["time"])
        for a, b in zip(newest, newest[1:], strict=False)
        if b["step"] > a["step"] and "time" in a and "time" in b
    ]
    if not pairs:
        return None
    usual = statistics.median(seconds / steps for steps, seconds in pairs)
    kept = [(steps, seconds) for steps, seconds in pairs if seconds <= steps * 20 * usual]
    return sum(seconds for _, seconds in kept) / sum(steps for steps, _ in kept)


def duration(seconds: float) -> str:
    """Return seconds as two units: 3725 -> '1 h 2 min'."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if hours < 48:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{int(hours / 24)} d {int(hours) % 24} h"

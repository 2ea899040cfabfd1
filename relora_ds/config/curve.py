"""The learning-rate curve: which schedules there are, and what keeps numbers of steps from making one."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from relora_ds.config.rules import choice

Schedule = Literal["cosine", "wsd", "constant", "linear"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


class Names(NamedTuple):
    """How messages name the values of a curve: as arguments of `initialize`, unless a caller says otherwise."""

    schedule: str = "schedule"
    decay_steps: str = "decay_steps"
    warmup_steps: str = "warmup_steps"
    restart_every: str = "ReLoRAConfig.restart_every"
    restart_warmup_steps: str = "ReLoRAConfig.restart_warmup_steps"


ARGUMENTS = Names()


@dataclass(frozen=True)
class ScheduleConfig:
    """The curve: see `lowrank.schedule.lr_multiplier` for each field."""

    total_steps: int
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    restart_every: int | None = None
    restart_warmup_steps: int = 0
    schedule: str = "cosine"
    decay_steps: int | None = None

    def problem(self, names: Names = ARGUMENTS) -> str | None:
        """Return what is wrong with the schedule and its decay, or None; the numbers are right, each on its own."""
        if self.schedule != "wsd":
            return choice(names.schedule, self.schedule, SCHEDULES)
        total, ramp, every = self.total_steps, self.restart_warmup_steps, self.restart_every
        length = decay_length(total, self.decay_steps)
        shown = f"{names.decay_steps}: {length}" + (" (the default, a tenth)" if self.decay_steps is None else "")
        shown += f" of {total} steps begins the decay after step {total - length}, before "
        if total - length < self.warmup_steps:
            most = total - self.warmup_steps
            remedy = f"{names.decay_steps}={most} or less" if most > 0 else f"{names.warmup_steps}=0"
            return f"{shown}the warm-up ends ({names.warmup_steps} {self.warmup_steps}); use {remedy}"
        last = (total - 1) // every * every if every else 0
        most = total - last - ramp
        if last and ramp and length > most:
            remedy = f"{names.decay_steps}={most} or less, or " if most > 0 else ""
            return (
                f"{shown}the ramp of the restart after step {last} ends ({names.restart_every} {every}, "
                f"{names.restart_warmup_steps} {ramp}); use {remedy}{names.restart_warmup_steps}=0"
            )
        return None


def decay_length(total_steps: int, decay_steps: int | None) -> int:
    """Return the steps of wsd's decay: `decay_steps`, else a tenth of the curve, at least one."""
    return max(1, total_steps // 10) if decay_steps is None else decay_steps

"""When a run does what: phases, restarts, and the learning rate of every step.

All of it comes from the functions that training itself calls: `phases_of`, `Phase.restarts`, `lr_multiplier`.
"""

from bisect import bisect_left
from dataclasses import dataclass

from relora_ds.config import Recipe
from relora_ds.lowrank.schedule import lr_multiplier
from relora_ds.training.phases import Phase, phases_of

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Event:
    """After `step` applied steps of the run: what happens, and the learning rate of the next update."""

    step: int
    phase: str
    what: str
    lr: float


def learning_rate(recipe: Recipe, phase: Phase, step: int) -> float:
    """Return the learning rate of the run's update number `step + 1`, for a step of `phase`."""
    relora = phase.method.relora
    return phase.lr * lr_multiplier(
        step - phase.start,
        total_steps=phase.total_steps,
        warmup_steps=phase.warmup_steps,
        restart_every=relora.restart_every if relora else None,
        restart_warmup_steps=relora.restart_warmup_steps if relora else 0,
        min_lr_ratio=recipe.optim.min_lr_ratio,
        schedule=phase.schedule,
        decay_steps=phase.decay_steps,
    )


def events(recipe: Recipe) -> list[Event]:
    """Return the steps at which something happens, ascending."""
    found = []
    for phase in phases_of(recipe):
        relora = phase.method.relora
        moments = [(phase.start, f"{phase.name} begins")]
        if phase.warmup_steps:
            moments.append((phase.start + phase.warmup_steps, "end of the warm-up"))
        if phase.decay_steps is not None:
            moments.append((phase.start + phase.total_steps - phase.decay_steps, "the decay begins"))
        for number, step in enumerate(phase.restarts, 1):
            moments.append((step, f"restart {number}"))
            if relora is not None and relora.restart_warmup_steps:
                moments.append((step + relora.restart_warmup_steps, "end of the re-warm-up"))
        found += [
            Event(step, phase.name, what, learning_rate(recipe, phase, step))
            for step, what in sorted(moments, key=lambda moment: moment[0])
            if step < phase.stop
        ]
    last = phases_of(recipe)[-1]
    found.append(Event(last.stop, last.name, "end of the run", learning_rate(recipe, last, last.stop - 1)))
    return found


def curve(recipe: Recipe, width: int = 72) -> list[float]:
    """Return the learning rate in `width` columns: the mean of a column's steps, or 0 where one holds a restart.

    A restart's trough is short and would not be seen in a mean.
    """
    phases = phases_of(recipe)
    total, restarts = recipe.total_steps, [step for phase in phases for step in phase.restarts]
    width = min(width, total)
    columns = []
    for i in range(width):
        steps = range(i * total // width, (i + 1) * total // width)
        rates = [learning_rate(recipe, _phase_at(phases, step), step) for step in _sampled(steps)]
        has_restart = bisect_left(restarts, steps.start) < bisect_left(restarts, steps.stop)
        columns.append(0.0 if has_restart else sum(rates) / len(rates))
    return columns


def draw(columns: list[float], height: int = 6) -> list[str]:
    """Text lines of a filled curve, the top one first; each value is a column of blocks."""
    top = max(columns) or 1.0
    eighths = [round(value / top * height * 8) for value in columns]
    return ["".join(BLOCKS[min(8, max(0, value - 8 * row))] for value in eighths) for row in reversed(range(height))]


def marks(recipe: Recipe, width: int = 72) -> str:
    """Return the line below the curve: `|` where a phase begins, `^` where a restart is."""
    total = recipe.total_steps
    width = min(width, total)
    line = [" "] * width
    for phase in phases_of(recipe):
        for step in phase.restarts:
            line[_column(step, total, width)] = "^"
        line[_column(phase.start, total, width)] = "|"
    return "".join(line).rstrip()


def _column(step: int, total: int, width: int) -> int:
    """Return the column whose steps include `step`: the inverse of `i * total // width`."""
    return ((step + 1) * width - 1) // total


def _phase_at(phases: list[Phase], step: int) -> Phase:
    return next(phase for phase in phases if step < phase.stop)


def _sampled(steps: range, at_most: int = 50) -> range:
    return steps[:: max(1, len(steps) // at_most)]

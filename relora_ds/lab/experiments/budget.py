"""What a suite costs, before it starts: runs × tokens ÷ tokens/s, and the speeds are measured."""

import json
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from relora_ds.config import Recipe, method_of
from relora_ds.lab.experiments import run_islands
from relora_ds.lab.experiments.runner import Runner, reason
from relora_ds.lab.experiments.runs import Results, Run
from relora_ds.training.exit_codes import Preempted
from relora_ds.training.metrics_log import read_metrics

TRIAL_STEPS = 8  # of which the first ones, that allocate, do not count
WARM_STEPS = 2


@dataclass(frozen=True)
class Line:
    """The runs of a suite that are equally fast.

    Attributes:
        rows: their names.
        runs, finished: how many, and how many of them have a result.
        tokens: of all their training.
        tokens_left: of what has not ended. What an unfinished run has done already is counted as left.
        tokens_per_s: of one run, all its islands together, evaluations and checkpoints not counted; None where it was
            not measured.
    """

    rows: tuple[str, ...]
    runs: int
    finished: int
    tokens: int
    tokens_left: int
    tokens_per_s: float | None

    @property
    def hours(self) -> float | None:
        """Hours of what is left, one run at a time."""
        return None if self.tokens_per_s is None else self.tokens_left / self.tokens_per_s / 3600


def budget(runs: Sequence[Run], results: Results, measure: Callable[[Run], float] | None) -> list[Line]:
    """Return what the runs cost.

    Args:
        measure: tokens/s of a run like this one, asked once where no finished run tells; None leaves it open.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(_speed_class(run.recipe), []).append(run)
    lines = []
    for found in alike.values():
        kept = [result for run in found if (result := results.read(run))]
        left = [run for run in found if results.read(run) is None]
        speed = statistics.median(one["tokens"] / one["seconds"] for one in kept) if kept else None
        if speed is None and measure is not None:
            speed = measure(left[0])
        lines.append(
            Line(
                tuple(dict.fromkeys(run.row.name for run in found)),
                len(found),
                len(kept),
                sum(run.tokens for run in found),
                sum(run.tokens for run in left),
                speed,
            )
        )
    return lines


def trial(runner: Runner) -> Callable[[Run], float]:
    """Return a `measure`: a few steps of a run on real data, in a directory of their own.

    Islands take them at the same time, as they share the machine, and exchange nothing.
    """

    def measure(run: Run) -> float:
        text = runner.runs / "trials/validation.jsonl"  # evaluating on the real one would take longer than the steps
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(json.dumps({"text": "A few words. " * 400}) + "\n", encoding="utf-8")
        steps = 2 * TRIAL_STEPS if method_of(run.recipe).warm_start_steps else TRIAL_STEPS
        directories = run_islands.directories(text.parent / run.name, run.recipe.islands.count)

        def execute(directory: Path) -> int:
            return runner.execute(
                run,
                directory,
                "overwrite=true",
                *run_islands.ALONE,
                f"train.steps={steps}",
                f"warm_start_steps={steps - TRIAL_STEPS}",
                "relora.restart_every=null",
                "optim.warmup_steps=1",
                "optim.warm_start_warmup_steps=1",
                f"data.validation={text}",
                "eval.every=null",
                "eval.samples=0",
                "log.every=1",
                "checkpoint.every=null",
                "checkpoint.keep_every=null",
            )

        with ThreadPoolExecutor(len(directories)) as pool:
            codes = dict(zip(directories, pool.map(execute, directories), strict=True))
        if runner.stopping.is_set():
            raise Preempted(f"the trial of {run.row.name} was stopped")
        for directory, code in codes.items():
            if code != 0:
                raise ValueError(
                    f"{run.row.name}: a trial of {steps} steps failed: {reason(directory, code)}; see {directory}.log"
                )
        return sum(_mean_speed(run.recipe, read_metrics(directory)) for directory in directories)

    return measure


def _mean_speed(recipe: Recipe, lines: list[dict]) -> float:
    """Over the run's phases: tokens/s of each one's share of the steps. lines: of `metrics.jsonl`."""
    speeds: dict[str, list[float]] = {}
    for line in lines:
        if line["kind"] == "train":
            speeds.setdefault(line["phase"], []).append(line["tokens_per_s"])
    of = {phase: statistics.median(found[WARM_STEPS:]) for phase, found in speeds.items()}
    warm = method_of(recipe).warm_start_steps if "warm_start" in of else 0
    return recipe.total_steps / (warm / of.get("warm_start", 1) + (recipe.total_steps - warm) / of[recipe.method])


def _speed_class(recipe: Recipe) -> str:
    """Recipes with the same one are equally fast."""
    method = method_of(recipe)
    return json.dumps(
        [
            method.speed_key,
            vars(recipe.model),
            recipe.precision,
            round(method.full_rank_steps / recipe.total_steps, 1),
            recipe.islands.count,
            recipe.batch_sequences,
            recipe.train.micro_batch_size,
            recipe.data.seq_len,
            recipe.data.vocab_size,
            recipe.compile,
            recipe.activation_checkpointing,
        ]
    )

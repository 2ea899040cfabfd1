"""Whole runs on the rank processes, and reading what they left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from relora_ds.training.hooks import Hook
from relora_ds.training.metrics_log import read_metrics
from relora_ds.training.preflight import check
from relora_ds.training.state import RunState
from relora_ds.training.step import Step
from relora_ds.training.trainer import Trainer
from tests.ranks import ranks


class AfterStep(Hook):
    """Calls a function after every step."""

    def __init__(self, call: Callable[[RunState], object]):
        self._call = call

    def on_step(self, run: RunState, step: Step) -> None:
        self._call(run)


def train(recipe: str, overrides: list[str]) -> dict:
    """On a rank: train a recipe to its end; returns the summary."""
    return Trainer(check(recipe, overrides)).fit()


def run(run_dir: Path, *overrides: str, recipe: str = "tiny", world_size: int = 2) -> dict:
    """Train on `world_size` ranks into `run_dir`; returns the summary. Text samples take a tenth of so short a run's
    time, so there are none unless overridden.
    """
    return ranks(world_size).run(train, recipe, [f"run_dir={run_dir}", "eval.samples=0", *overrides])[0]


def lines(run_dir: Path, kind: str) -> list[dict]:
    """The lines of one kind in metrics.jsonl."""
    return [line for line in read_metrics(run_dir) if line["kind"] == kind]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in lines(run_dir, "train")}


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def died_before_its_first_checkpoint(run_dir: Path) -> None:
    """Leave of a run what it had written by then."""
    for name in ("checkpoints", "export"):
        shutil.rmtree(run_dir / name)
    (run_dir / "summary.json").unlink()
    (run_dir / "status.json").write_text(json.dumps({**status(run_dir), "state": "running", "exit_code": None}))
    written = [line for line in read_metrics(run_dir) if line["kind"] != "checkpoint"]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))

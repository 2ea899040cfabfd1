"""What a run left behind, as columns that can be drawn. A run that still trains, or failed, is one too."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from relora_ds.config import METHODS, Recipe, method_of, read_recipe
from relora_ds.training.metrics_log import read_json, read_metrics
from relora_ds.utils.files import short_names

logger = logging.getLogger(__name__)

TRAIN_COLUMNS = ("step", "loss", "lr", "tokens", "tokens_per_s", "total_bytes_wire", "full_rank_bytes_wire")


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: short, unique among the runs that are drawn together.
        state, reason: of status.json; "unknown" where there is none.
        verdict: the sentence of summary.json; "" before the end.
        train: columns of the logged training steps, fp64, NaN for what was not finite.
        evaluations: columns `step`, `val_loss`, `bits_per_byte`, and `tokens` and `total_bytes_wire` at that step.
        restarts: the steps after which there was one.
        transitions: the steps at which a phase took over from another one.
        trainable, total: parameters of the last phase.
        samples: (prompt, text) pairs of the last evaluation.
    """

    name: str
    method: str
    state: str
    reason: str
    verdict: str
    train: dict[str, np.ndarray]
    evaluations: dict[str, np.ndarray]
    restarts: list[int]
    transitions: list[int]
    trainable: int
    total: int
    samples: list[tuple[str, str]]

    @property
    def has_traffic(self) -> bool:
        """Whether anything was sent: a single rank sends nothing."""
        return bool(self.train["total_bytes_wire"].any())


def read_runs(directories: Sequence[Path]) -> list[RunRecord]:
    """Return the runs in these directories, each once.

    Raises:
        ValueError: for a directory that is not a run, or whose run has not logged a training step.
    """
    paths = list(dict.fromkeys(directory.resolve() for directory in directories))
    return [_read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def _read_run(directory: Path, name: str) -> RunRecord:
    if not (directory / "metrics.jsonl").is_file():
        raise ValueError(f"{directory}: no run; it has no metrics.jsonl")
    lines: dict[str, list[dict]] = {}
    for line in read_metrics(directory):
        lines.setdefault(line["kind"], []).append(line)
    if "train" not in lines:
        raise ValueError(f"{directory}: its metrics.jsonl has no training step; wait for the run's first logged one")
    train = {column: _column(lines["train"], column) for column in TRAIN_COLUMNS}
    evaluations = {column: _column(lines.get("eval", []), column) for column in ("step", "val_loss", "bits_per_byte")}
    for column in ("tokens", "total_bytes_wire"):
        evaluations[column] = value_at(train, column, evaluations["step"])
    status, phases = read_json(directory / "status.json"), lines.get("phase", [{}])
    return RunRecord(
        name=name,
        method=method_text(directory),
        state=status.get("state", "unknown"),
        reason=status.get("reason", ""),
        verdict=read_json(directory / "summary.json").get("verdict", ""),
        train=train,
        evaluations=evaluations,
        restarts=[line["step"] for line in lines.get("restart", [])],
        transitions=[
            after["step"]
            for before, after in zip(phases, phases[1:], strict=False)
            if before["phase"] != after["phase"]
        ],
        trainable=phases[-1].get("trainable_parameters", 0),
        total=phases[-1].get("total_parameters", 0),
        samples=[(s["prompt"], s["text"]) for s in lines.get("eval", [{}])[-1].get("samples", [])],
    )


def value_at(train: dict[str, np.ndarray], column: str, steps: ArrayLike) -> np.ndarray:
    """Return what a column of `RunRecord.train` that counts from 0 was at these steps."""
    return np.interp(np.asarray(steps, dtype=np.float64), [0, *train["step"]], [0, *train[column]])


def _column(lines: list[dict], key: str) -> np.ndarray:
    values = [line.get(key) for line in lines]
    return np.array([value if isinstance(value, (int, float)) else np.nan for value in values], dtype=np.float64)


def recipe_in(directory: Path) -> Recipe | None:
    """Read the recipe in a run directory; None where it is missing and, with a warning, where it is damaged."""
    path = directory / "recipe.yaml"
    if not path.is_file():
        return None
    recipe, problems = read_recipe(path, check_files=False)
    if unreadable := next((problem for problem in problems if problem.startswith(str(path))), None):
        logger.warning("%s; its contents are ignored", unreadable.splitlines()[0])
        return None
    return recipe


def method_text(directory: Path) -> str:
    """Return what the recipe in a run directory trains with; "unknown" without one."""
    recipe = recipe_in(directory)
    if recipe is None:
        return "unknown"
    return method_of(recipe).label if recipe.method in METHODS else recipe.method

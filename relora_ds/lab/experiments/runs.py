"""One run of an experiment: what it is known by, and what is kept of it.

A run is known by its recipe: rows of several suites that are the same training share it. Its directory, with
checkpoints, is under `--runs`; what the tables and figures need is one small file under `--results`, so that the
directory can go.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from relora_ds.checkpoint.run_files import read_json
from relora_ds.config import Recipe, load_recipe, method_of
from relora_ds.lab.experiments import run_islands, update_spectra
from relora_ds.lab.experiments.suites import Row
from relora_ds.training.metrics_log import read_metrics
from relora_ds.utils.files import write_text

# Of a recipe: what says how a run is watched and how fast it is, not what it computes; and what its name says anyway.
_ELSEWHERE = ("run_dir", "resume", "overwrite", "eval", "log", "checkpoint", "guard", "compile", "seed")
NUM_POINTS = 100  # of a training curve


@dataclass(frozen=True)
class Run:
    """A row's run of one seed.

    Attributes:
        overrides: of the row's recipe, the seed and the user's among them.
        name: the same for the same training, whatever suite it is in.
    """

    row: Row
    seed: int
    overrides: tuple[str, ...]
    recipe: Recipe
    name: str

    @classmethod
    def of(cls, row: Row, seed: int, overrides: Sequence[str] = ()) -> "Run":
        """Return the run of a row with more overrides. Raise RecipeError where they are wrong.

        Its files need not exist: what is kept of a run is read where its data is not.
        """
        overrides = (*row.overrides, *overrides, f"seed={seed}")
        recipe = load_recipe(row.recipe, overrides, check_files=False)
        digest = hashlib.sha256(json.dumps(_settings(recipe), sort_keys=True).encode()).hexdigest()[:10]
        return cls(row, seed, overrides, recipe, f"{recipe.method}-{digest}-seed{seed}")

    def check_files(self) -> None:
        """Raise RecipeError where a file of the recipe is missing."""
        load_recipe(self.row.recipe, self.overrides)

    @property
    def tokens(self) -> int:
        """Of all its islands."""
        return self.recipe.total_steps * self.recipe.tokens_per_step * (self.recipe.islands.count or 1)


def _settings(recipe: Recipe) -> dict:
    """Return the keys that decide what is computed, without defaults: later versions' keys then change no old name."""

    def leaves(of: Recipe) -> dict:
        return {
            (section, key): value
            for section, values in asdict(of).items()
            for key, value in (values if isinstance(values, dict) else {"": values}).items()
        }

    defaults = leaves(Recipe())
    return {
        f"{section}.{key}": value
        for (section, key), value in leaves(recipe).items()
        if value != defaults[section, key] and section not in _ELSEWHERE
    }


def result_of(run: Run, directory: Path, conditions: dict) -> dict:
    """Return what is kept of a finished run; plain JSON. All islands have the same weights: the first tells of them.

    Args:
        conditions: what `environment_info` said when the run was started, or last resumed.
    """
    islands = run.recipe.islands.count
    directory, *_ = run_islands.directories(directory, islands)
    summary, lines = read_json(directory / "summary.json"), read_metrics(directory)
    summary["tokens"] *= islands or 1
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    restarts = [line for line in lines if line["kind"] == "restart"]
    exchanges = [line for line in lines if line["kind"] == "sync"]
    tokens_per_step = summary["tokens"] / summary["step"]
    method = method_of(run.recipe)
    transition = method.warm_start_steps if method.low_rank_steps else None
    phases = {line["phase"] for line in train}
    speeds = {phase: sorted(line["tokens_per_s"] for line in train if line["phase"] == phase) for phase in phases}
    return {
        "name": run.name,
        "seed": run.seed,
        "recipe": [run.row.recipe, *run.overrides],
        **{
            key: summary[key]
            for key in (
                "method",
                "model",
                "precision",
                "world_size",
                "val_loss",
                "val_tokens",
                "data_fingerprint",
                "ppl",
                "tokens",
                "step",
                "seconds",
                "restarts",
                "skipped_steps",
                "trainable_parameters",
                "total_parameters",
                "bytes_wire",
                "full_rank_bytes_wire",
            )
        },
        "r": method.rank,
        "tokens_per_s": {phase: found[len(found) // 2] for phase, found in speeds.items()},
        "loss_at_switch": next((line["val_loss"] for line in evaluations if line["step"] == transition), None),
        # Of the whole validation split: a part of it has another loss (`eval.max_tokens`).
        "curve": [
            [tokens_per_step * line["step"], line["val_loss"]]
            for line in evaluations
            if line["val_tokens"] == summary["val_tokens"]
        ],
        "train_curve": _thinned(
            [
                [line["tokens"] * (islands or 1), line["loss"]]
                for line in train
                if line["step"] % run.recipe.log.every == 0
            ]
        ),  # after a restart there are more
        "restart_steps": [line["step"] for line in restarts],
        "merge_loss_total": restarts[-1].get("merge_loss_total") if restarts else None,
        "islands": islands,
        "exchanges": len(exchanges),
        "bytes_exchanged": sum(line["bytes_sent"] + line["bytes_received"] for line in exchanges),  # by one of them
        "first_updates": _first_updates(train),
        "spectrum": _spectrum(directory, transition),
        "conditions": {key: value for key, value in conditions.items() if key != "threads"},  # of this process
    }


def _spectrum(directory: Path, transition: int | None) -> dict | None:
    """Return the spectrum of the update since the warm start, or since the oldest checkpoint that is kept.

    None where there is none, or none that leaves out the warm start, which ends at step `transition`.
    """
    try:
        found = update_spectra.measure([directory])["runs"][0]
    except ValueError:
        return None
    if transition is not None and found["start"] < transition:
        return None
    kinds = {
        kind: {name: value for name, value in one.items() if name != "singular_values"}
        for kind, one in found["kinds"].items()
    }
    return {"start": found["start"], "numerical_rank": found["numerical_rank"], "kinds": kinds}


def _first_updates(train: list[dict]) -> float | None:
    """max|ΔA| / learning rate in the steps after any restart in which it is measured."""
    return max(
        (line["max_update_over_lr"] for line in train if line.get("max_update_over_lr") is not None), default=None
    )


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Return at most NUM_POINTS values, each the mean of as many neighbours."""
    size = -(-len(points) // NUM_POINTS)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        [chunk[-1][0], sum(loss for _, loss in chunk) / len(chunk)]
        for chunk in chunks
        if all(loss is not None for _, loss in chunk)
    ]


class Results:
    """The kept results, one file a run."""

    def __init__(self, directory: Path):
        self.directory = directory

    def read(self, run: Run) -> dict | None:
        """None where the run has not ended."""
        return read_json(self._path(run)) or None

    def write(self, run: Run, result: dict) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text(self._path(run), json.dumps(result) + "\n")

    def _path(self, run: Run) -> Path:
        return self.directory / f"{run.name}.json"

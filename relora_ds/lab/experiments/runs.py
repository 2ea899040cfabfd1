"""One run of an experiment: where it is, how it is trained, and what is kept of it.

A run is known by its recipe: rows of several suites that are the same training share it. Its directory, with
checkpoints, is under `--runs`; what the tables and figures need is one small file under `--results`, so that the
directory can go.
"""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from relora_ds.checkpoint.run_files import read_json
from relora_ds.config import Recipe, load_recipe, method_of
from relora_ds.lab.bench.environment import environment_info
from relora_ds.lab.experiments import run_islands, update_spectra
from relora_ds.lab.experiments.suites import Row
from relora_ds.training.exit_codes import PREEMPTED, Preempted
from relora_ds.training.metrics_log import read_metrics
from relora_ds.utils.files import write_text

# Of a recipe: what says how a run is watched, not what it computes; and what its name says anyway.
_ELSEWHERE = ("run_dir", "resume", "overwrite", "eval", "log", "checkpoint", "guard", "seed")
NUM_POINTS = 100  # of a training curve
COMMAND = "\n$ "  # stands before each command in a run's log


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
        """Return the run of a row with more overrides. Raise RecipeError where they are wrong."""
        overrides = (*row.overrides, *overrides, f"seed={seed}")
        recipe = load_recipe(row.recipe, overrides)
        digest = hashlib.sha256(json.dumps(_settings(recipe), sort_keys=True).encode()).hexdigest()[:10]
        return cls(row, seed, overrides, recipe, f"{recipe.method}-{digest}-seed{seed}")

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


class Runner:
    """Trains runs in processes of their own.

    Args:
        runs: the directory of run directories.
        num_gpus: of each run, started by `deepspeed`; 0: one process without a launcher.
        threads: CPU threads of a run; None leaves it to PyTorch.
    """

    def __init__(self, runs: Path, num_gpus: int = 0, threads: int | None = None):
        self.runs, self.num_gpus, self.threads = runs.resolve(), num_gpus, threads
        self.stopping = threading.Event()
        self._processes: dict[Path, subprocess.Popen] = {}

    def directory(self, run: Run) -> Path:
        return self.runs / run.name

    def train_all(self, runs: Sequence[Run], results: "Results", jobs: int, say: Callable[[str], None]) -> list[str]:
        """Train what has no result yet, `jobs` at a time, and keep the results; returns why runs failed.

        Raises:
            Preempted: it was told to stop; what was running has saved itself.
        """

        def train(run: Run) -> str | None:
            if self.stopping.is_set():
                raise Preempted(f"{run.name} was not started")
            if results.read(run) is None:
                say(f"{run.row.name}, seed {run.seed}: {self.directory(run)}")
                if failure := self.train(run):
                    return failure
                results.write(run, result := result_of(run, self.directory(run)))
                say(
                    f"{run.row.name}, seed {run.seed}: validation loss {result['val_loss']:.4f}, "
                    f"{result['seconds'] / 60:.0f} min"
                )
            return None

        with ThreadPoolExecutor(jobs) as pool:
            return [failure for failure in pool.map(train, runs) if failure]

    def train(self, run: Run) -> str | None:
        """Train it, or resume it; returns why it failed, or None.

        Raises:
            Preempted: it was told to stop; what was running has saved itself.
        """
        was_stopped = False
        for directory, code in self._execute_all(run).items():
            status = read_json(directory / "status.json")
            if status.get("state") == "preempted" or code in (PREEMPTED, -signal.SIGTERM):
                was_stopped = True
            elif status.get("state") != "done" and not self.stopping.is_set():
                why = status.get("reason") or reason(directory, code)
                return f"{run.name} ({run.row.name}): {why}; see {directory}.log"
        if was_stopped or self.stopping.is_set():
            self.stop()  # the signal was for all
            raise Preempted(f"{run.name} was stopped")
        return None

    def _execute_all(self, run: Run) -> dict[Path, int]:
        """Train a run, or all of its islands at the same time; return exit codes by run directory."""
        directories = run_islands.directories(self.directory(run), run.recipe.islands.count)
        if run.recipe.islands.count is None:
            return {directory: self.execute(run, directory, "resume=auto") for directory in directories}
        with run_islands.serving(self.directory(run)) as (overrides, secret), ThreadPoolExecutor() as pool:
            islands = {
                pool.submit(
                    self.execute, run, directory, *overrides, f"islands.index={i}", "resume=auto", environment=secret
                ): directory
                for i, directory in enumerate(directories)
            }
            for ended in as_completed(islands):
                if ended.result():  # the others would wait for it at every exchange
                    self._terminate(directories)
        return {directory: ended.result() for ended, directory in islands.items()}

    def execute(self, run: Run, directory: Path, *more: str, environment: Mapping[str, str] | None = None) -> int:
        """Run `train.py` on a run's recipe; its output goes to a log beside the directory. Returns the exit code."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        launcher = ["deepspeed.launcher.runner", "--num_gpus", str(self.num_gpus), "--module"] if self.num_gpus else []
        command = [
            sys.executable,
            "-m",
            *launcher,
            "relora_ds.train",
            "--config",
            run.row.recipe,
            *run.overrides,
            f"run_dir={directory}",
            *more,
        ]
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        with open(f"{directory}.log", "a", encoding="utf-8") as log:
            if self.stopping.is_set():
                raise Preempted(f"{run.name} was not started")
            print(f"{COMMAND}{shlex.join(command)}", file=log, flush=True)
            # A session of its own: a Ctrl-C reaches it once, through `stop`.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, **(environment or {})},
                start_new_session=True,
            )
            self._processes[directory] = process
            if self.stopping.is_set():  # between the last look and this one
                process.send_signal(signal.SIGTERM)
            try:
                return process.wait()
            finally:
                del self._processes[directory]

    def stop(self) -> None:
        """Have what is running save itself and end."""
        self.stopping.set()
        self._terminate(list(self._processes))

    def _terminate(self, directories: Sequence[Path]) -> None:
        for directory in directories:
            if process := self._processes.get(directory):
                process.send_signal(signal.SIGTERM)


def reason(directory: Path, code: int) -> str:
    """Return why the last command in a run's log ended: the error that it printed, or its exit code."""
    log = Path(f"{directory}.log").read_text(encoding="utf-8", errors="replace")
    errors = re.findall(r"^error: (.*(?:\n[ \t].*)*)", log.rpartition(COMMAND)[2], re.MULTILINE)
    return errors[-1] if errors else f"exit code {code}"


def result_of(run: Run, directory: Path) -> dict:
    """Return what is kept of a finished run; plain JSON. All islands have the same weights: the first tells of them."""
    islands = run.recipe.islands.count
    directory, *_ = run_islands.directories(directory, islands)
    summary, lines = read_json(directory / "summary.json"), read_metrics(directory)
    summary["tokens"] *= islands or 1
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    restarts = [line for line in lines if line["kind"] == "restart"]
    exchanges = [line for line in lines if line["kind"] == "exchange"]
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
        "r": None if method.relora is None else method.relora.r,
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
        "conditions": {key: value for key, value in environment_info().items() if key != "threads"},
    }  # of this process


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

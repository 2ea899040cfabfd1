"""Train the runs of an experiment: start their processes, stop them, and say why one failed."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from relora_ds.checkpoint.run_files import read_json
from relora_ds.lab.bench.environment import environment_info
from relora_ds.lab.experiments import run_islands
from relora_ds.lab.experiments.runs import Results, Run, result_of
from relora_ds.training.exit_codes import PREEMPTED, Preempted
from relora_ds.utils.ports import free_port

COMMAND = "\n$ "  # stands before each command in a run's log
GRACE_S = 40  # launchers give their ranks 30 s to save themselves


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
        self._ending: set[Path] = set()  # told to end, also where the process starts only now

    def directory(self, run: Run) -> Path:
        return self.runs / run.name

    def train_all(self, runs: Sequence[Run], results: Results, jobs: int, say: Callable[[str], None]) -> list[str]:
        """Train what has no result yet, `jobs` at a time, and keep the results; returns why runs failed.

        Raises:
            Preempted: it was told to stop; what was running has saved itself.
        """

        def train(run: Run) -> str | None:
            if self.stopping.is_set():
                raise Preempted(f"{run.name} was not started")
            if results.read(run) is None:
                say(f"{run.row.name}, seed {run.seed}: {self.directory(run)}")
                conditions = environment_info()  # now: the checkout may move on under a run of hours
                if failure := self.train(run):
                    return failure
                results.write(run, result := result_of(run, self.directory(run), conditions))
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
        directories, was_stopped = run_islands.directories(self.directory(run), run.recipe.islands.count), False
        earlier = {directory: read_json(directory / "status.json") for directory in directories}
        for directory, code in self._execute_all(run, directories).items():
            status = read_json(directory / "status.json")
            if status == earlier[directory]:  # of an earlier start: this one failed before it opened the directory
                status = {}
            if status.get("state") == "preempted" or code in (PREEMPTED, -signal.SIGTERM):
                was_stopped = True
            elif status.get("state") != "done" and not self.stopping.is_set():
                why = status.get("reason") or reason(directory, code)
                return f"{run.name} ({run.row.name}): {why}; see {directory}.log"
        if was_stopped or self.stopping.is_set():
            self.stop()  # the signal was for all
            raise Preempted(f"{run.name} was stopped")
        return None

    def _execute_all(self, run: Run, directories: Sequence[Path]) -> dict[Path, int]:
        """Train a run, or all of its islands at the same time; return exit codes by directory, in the order of ends."""
        if run.recipe.islands.count is None:
            return {directory: self.execute(run, directory, "resume=auto") for directory in directories}
        self._ending.difference_update(directories)
        with (
            run_islands.serving(self.directory(run)) as (overrides, secret),
            ThreadPoolExecutor(len(directories)) as pool,  # an island that is not started keeps the others waiting
        ):
            islands = {
                pool.submit(
                    self.execute, run, directory, *overrides, f"islands.index={i}", "resume=auto", environment=secret
                ): directory
                for i, directory in enumerate(directories)
            }
            ended = []
            for island in as_completed(islands):
                ended.append(island)
                if island.exception() or island.result():  # the others would wait for it at every exchange
                    self._terminate(directories)
        return {islands[island]: island.result() for island in ended}

    def execute(self, run: Run, directory: Path, *more: str, environment: Mapping[str, str] | None = None) -> int:
        """Run `train.py` on a run's recipe; its output goes to a log beside the directory. Returns the exit code."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        launcher = []
        if self.num_gpus:
            port = str(free_port())  # the launcher's default is one port for all that run at the same time
            options = ["--num_gpus", str(self.num_gpus), "--master_port", port, "--module"]
            launcher = ["deepspeed.launcher.runner", *options]
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
            if self.stopping.is_set() or directory in self._ending:  # between the last look and this one
                _signal(process)
            try:
                code = process.wait()
                _await_group(process.pid)
                return code
            finally:
                del self._processes[directory]

    def stop(self) -> None:
        """Have what is running save itself and end."""
        self.stopping.set()
        self._terminate(list(self._processes))

    def _terminate(self, directories: Sequence[Path]) -> None:
        self._ending.update(directories)
        for directory in directories:
            if process := self._processes.get(directory):
                _signal(process)


def _signal(process: subprocess.Popen) -> None:
    """Ask a process and its children to end: DeepSpeed's launcher dies of SIGTERM without telling its ranks."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def _await_group(group: int) -> None:
    """Wait for the children of a process that has ended, at most until a launcher would kill them."""
    ends = time.monotonic() + GRACE_S
    while time.monotonic() < ends:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def reason(directory: Path, code: int) -> str:
    """Return why the last command in a run's log ended: the error that it printed, or its exit code."""
    log = Path(f"{directory}.log").read_text(encoding="utf-8", errors="replace")
    errors = re.findall(r"^error: (.*(?:\n[ \t].*)*)", log.rpartition(COMMAND)[2], re.MULTILINE)
    return errors[-1] if errors else f"exit code {code}"

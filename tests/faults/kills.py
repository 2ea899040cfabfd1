"""kill -9, at a chosen place or at a random instant, and what is left of a run when it goes on.

    python -m tests.faults.kills --kills 200 --out docs/results/kills.jsonl

kills one rank or all of them, at every place below and at instants that are uniform over what is left of the run, three
times; then the run goes on to its end, and must have the losses and weights of the one that nobody touched.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from relora_ds.checkpoint.store import directories
from relora_ds.lab.bench.environment import environment_info
from relora_ds.training.hooks import Hook
from relora_ds.training.metrics_log import read_metrics
from tests.ranks import Ranks
from tests.training.runs import losses

STEPS, KILLS_OF_A_RUN = 40, 3
SETTINGS = [
    "checkpoint.every=4",
    "checkpoint.keep_last=3",
    "eval.samples=0",
    "log.every=1",
    "precision=bf16",
    "resume=auto",
]

# A call at whose beginning the process dies: (module, what it is called there).
PLACES = {
    "a save: copying": ("relora_ds.zero.capture", "capture"),
    "a save: before the first file": ("relora_ds.checkpoint.rank_files", "save_file"),
    "a save: before a file is on the disk": ("relora_ds.utils.files", "sync"),
    "a save: before the manifest": ("relora_ds.checkpoint.manifest", "Manifest.write"),
    "a save: before the rename": ("relora_ds.checkpoint.writer", "os.replace"),
    "a save: before latest": ("relora_ds.checkpoint.writer", "files.write_text"),
    "a save: deleting old ones": ("relora_ds.checkpoint.store", "remove"),
    "a restart: at its beginning": ("relora_ds.zero.engine", "restart"),
    "a restart: before the broadcast": ("relora_ds.zero.merging", "checksum"),
    "a restart: before A and B are new": ("relora_ds.zero.restart", "_reinitialise"),
    "a restart: before the moments are pruned": ("relora_ds.zero.restart", "prune_moments"),
    "a restart: before the ranks agree": ("relora_ds.zero.restart", "verify"),
    "the switch: collecting": ("relora_ds.training.trainer", "hand_over"),
    "the switch: building": ("relora_ds.zero.weights", "OwnedWeights.read"),
    "the switch: before the first step": ("relora_ds.training.hooks.saving", "writer_of"),
}


class Mortal(Ranks):
    """Rank processes that may die; the others live on for a moment.

    Args:
        mourning: for so many seconds at most.
        until: until this is true.

    Attributes:
        exit_codes: of those that died, None for one that did not.
    """

    def __init__(self, world_size: int, mourning: float = 0.5, until: Callable[[], bool] = lambda: False):
        super().__init__(world_size)
        self._mourning, self._until = mourning, until

    def _fail(self, message: str):
        deadline = time.monotonic() + self._mourning
        while time.monotonic() < deadline and not self._until():
            time.sleep(0.05)
        while True:  # an end of its pipe is seen before its exit code
            self.exit_codes = [process.exitcode for process, _ in self._workers]
            if "it died" not in message or any(code is not None for code in self.exit_codes):
                break
            time.sleep(0.05)
        super()._fail(message)


class KillAfter(Hook):
    """Kills its process some seconds after the first phase began."""

    def __init__(self, seconds: float):
        self._timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))

    def on_phase(self, run):
        if not self._timer.is_alive() and not self._timer.finished.is_set():
            self._timer.start()


def train_and_die(overrides: list[str], rank: int | None, place: str | None, after: float) -> None:
    """On a rank: train, and be killed.

    Args:
        rank: the one that dies; None for all of them.
        place: one of PLACES, at its call number `after`; None for an instant, `after` seconds from the first step.
    """
    from relora_ds.training.preflight import check
    from relora_ds.training.trainer import Trainer

    hooks = []
    if rank is None or rank == dist.get_rank():
        if place is not None:
            _die_in(*PLACES[place], int(after))
        else:
            hooks.append(KillAfter(after))
    Trainer(check("tiny", overrides), hooks).fit()


def _die_in(module: str, name: str, call: int) -> None:
    owner = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, last), iter(range(1, 1 << 30))

    def deadly(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, last, deadly)


def attempt(run_dir: Path, steps: int = STEPS, **how) -> bool:
    """One start of a run; whether it came to its end."""
    ranks = Mortal(2)
    try:
        ranks.run(train_and_die, [f"run_dir={run_dir}", f"train.steps={steps}", *SETTINGS], **how)
    except AssertionError as error:
        if "it died" not in str(error) and "Connection" not in str(error) and "gloo" not in str(error):
            raise
        return False
    finally:
        ranks.stop()
    return True


def untouched(run_dir: Path, steps: int = STEPS) -> float:
    """Train to the end; returns the seconds from before the first step to the end."""
    assert attempt(run_dir, steps, rank=-1, place=None, after=0)
    times = [line["time"] for line in read_metrics(run_dir)]
    return max(times) - min(times)


def require_equal(run_dir: Path, whole: Path) -> None:
    """Losses, and weights to the bit."""
    assert losses(run_dir) == losses(whole)
    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (run_dir, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _saved_step(run_dir: Path) -> int:
    found = directories(run_dir)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="one JSON line for each kill, appended")
    arguments = parser.parse_args()
    chance, directory = random.Random(arguments.seed), Path(tempfile.mkdtemp())
    seconds, killed, lived = untouched(directory / "whole"), 0, 0
    places = [place for place in PLACES for _ in range(3)]
    with arguments.out.open("a", encoding="utf-8") as log:
        log.write(json.dumps({"session": environment_info(), "seed": arguments.seed}) + "\n")
        while killed < arguments.kills:
            run_dir, finished = directory / f"run_{lived}", False
            for _ in range(KILLS_OF_A_RUN):
                place = places.pop() if places else None
                rank = chance.choice([None, 0, 1])
                # What happens once in a run is killed at its first call.
                after = (
                    (1 if "switch" in place else chance.randint(1, 2))
                    if place
                    else chance.uniform(0, seconds * (1 - _saved_step(run_dir) / STEPS))
                )
                finished = attempt(run_dir, rank=rank, place=place, after=after)
                killed += not finished
                log.write(
                    json.dumps(
                        {
                            "kill": killed,
                            "where": place or f"{after:.3f} s after the first step",
                            "call": after if place else None,
                            "rank": rank,
                            "saved_step": _saved_step(run_dir),
                            "outcome": "came to its end before" if finished else "killed",
                        }
                    )
                    + "\n"
                )
                log.flush()
                if finished:
                    break
            assert finished or attempt(run_dir, rank=-1, place=None, after=0)
            require_equal(run_dir, directory / "whole")
            lived += 1
            log.write(json.dumps({"run": lived, "outcome": "equal to the untouched run, to the bit"}) + "\n")
            shutil.rmtree(run_dir)
            print(f"{killed} kills, {lived} runs at their end, all equal", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

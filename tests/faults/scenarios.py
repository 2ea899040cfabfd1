"""Accidents x what the user does next: nothing is lost, or the action is refused and leaves everything as it was.

    python -m tests.faults.scenarios          # the whole table

Every cell starts from a copy of the same run: stopped by SIGTERM after about 14 of its 24 steps, killed, or finished.
"""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

from relora_ds.__main__ import main as command
from relora_ds.checkpoint import manifest, store
from relora_ds.checkpoint.find import ResumeError
from relora_ds.config import RecipeError
from relora_ds.training import lock
from relora_ds.training.exit_codes import GuardError, Preempted
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.faults.accidents import ACCIDENTS, Accident
from tests.faults.kills import Mortal, train_and_die
from tests.faults.mishaps import FOREIGN_SOURCE, MISHAPS
from tests.ranks import ranks
from tests.training.runs import AfterStep, losses, status

STEPS, STOP = 24, 13
SETTINGS = [f"train.steps={STEPS}", "checkpoint.every=6", "checkpoint.keep_last=99", "eval.samples=0", "precision=bf16"]
CODES = {RecipeError: 2, GuardError: 3, ResumeError: 4, Preempted: 75}
REFUSED = (2, 4)

TRAINING = {
    "start": [],
    "resume": ["resume=auto"],
    "overwrite": ["overwrite=true"],
    "requeue": ["overwrite=true"],
    "beside": ["resume=auto"],
}
COMMANDS = {
    "prune": ["checkpoint", "prune", "RUN", "--keep-last", "1"],
    "verify": ["checkpoint", "verify", "RUN"],
    "export": ["export", "RUN", "OUT"],
}
ACTIONS = (*TRAINING, *COMMANDS)
ENDINGS = ("whole", "stopped")
# What Slurm tells a job that it has started again.
REQUEUED = {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "1"}


@dataclass(frozen=True)
class Templates:
    """Attributes: stopped, killed, finished: the same run, after SIGTERM, after kill -9 of rank 0, and at its end."""

    stopped: Path
    killed: Path
    finished: Path


def make_templates(directory: Path) -> Templates:
    made = Templates(directory / "stopped", directory / "killed", directory / "finished")
    for run, stop in ((made.finished, None), (made.stopped, STOP)):
        code, message = _on_ranks([f"run_dir={run}"], stop=stop)
        assert code == (0 if stop is None else 75), message
    pair = Mortal(2)
    with contextlib.suppress(AssertionError):  # it died
        pair.run(
            train_and_die, [f"run_dir={made.killed}", *SETTINGS], rank=0, place="a save: before the manifest", after=2
        )
    pair.stop()
    assert [path.name for path in store.directories(made.killed)] == ["step_00000006"]
    return made


def attempt(
    overrides: list[str],
    accident: str = "nothing",
    environment: dict[str, str] | None = None,
    stop: int | None = None,
    mishap: str | None = None,
) -> tuple[int, str]:
    """On a rank: train. Returns the exit code and the message of an end that the program foresees.

    Args:
        stop: send SIGTERM to this process in the step after this one.
        mishap: what happens while it trains, one of MISHAPS.
    """
    run = Path(next(o for o in overrides if o.startswith("run_dir=")).removeprefix("run_dir="))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    quiet = io.StringIO()
    try:
        with (
            contextlib.ExitStack() as stack,
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
            mock.patch.dict(os.environ, environment or {}),
            ACCIDENTS[accident].disk(run),
        ):

            def watched(state):
                if mishap is not None:
                    MISHAPS[mishap](trainer, run, stack)
                if state.step == stop:
                    os.kill(os.getpid(), signal.SIGTERM)

            trainer = Trainer(check("tiny", [*SETTINGS, *overrides]), [AfterStep(watched)])
            trainer.fit()
    except tuple(CODES) as error:
        return next(code for kind, code in CODES.items() if isinstance(error, kind)), str(error)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0, ""


def contents(directory: Path) -> dict[str, str]:
    """Digest of every file of a run, but its lock; where a link leads."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(directory))] = f"-> {os.readlink(path)}"
        elif path.is_file() and path.name != lock.NAME:
            found[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def whole_checkpoints(run: Path) -> set[str]:
    """The manifests (their digests) of all checkpoints that are whole, wherever in the run they lie."""
    return {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob(manifest.NAME)
        if path.is_file() and not store.verify(path.parent)
    }


def cell(name: str, action: str, templates: Templates, directory: Path) -> str | None:
    """One cell of the table in an empty directory: what is wrong with it, or None."""
    accident, run = ACCIDENTS[name], directory / "run"
    shutil.copytree(getattr(templates, accident.of), run, symlinks=True)
    accident.cause(run)
    before, checkpoints = contents(run), whole_checkpoints(run)
    if action in TRAINING:
        code, message = _train(action, name, run)
    else:
        code, message = _command(action, accident, run, directory)
    after = contents(run)
    if code == 1 and (action in TRAINING or "Traceback" in message):
        return f"it failed: {message}"
    if action in ("start", "beside"):
        return _first(
            code not in REFUSED and f"it was not refused (exit code {code})",
            after != before and f"it was refused and changed {_changes(before, after)}",
        )
    if action == "verify":
        return after != before and f"it changed {_changes(before, after)}" or None
    if action == "prune":
        return _pruned(code, message, accident, before, after, checkpoints, whole_checkpoints(run))
    if action == "export":
        return _first(
            after != before and f"it changed the run: {_changes(before, after)}",
            code and "export" not in accident.may_refuse and f"it was refused: {message}",
            not code and not (directory / "out" / "model.safetensors").is_file() and "it wrote no model",
        )
    if code in REFUSED:
        return _first(
            action not in accident.may_refuse and f"it was refused: {message}",
            after != before and f"it was refused and changed {_changes(before, after)}",
        )
    lost = set() if action == "overwrite" else checkpoints - whole_checkpoints(run)
    strange = {path for path in before if path not in contents(templates.finished) and _is_foreign(path)}
    return _first(
        code and f"exit code {code}: {message}",
        lost and f"{len(lost)} whole checkpoints are gone",
        {path for path in strange if after.get(path) != before[path]} and "what is not ours was changed",
        *_end(run, templates.finished),
    )


def meanwhile(name: str, ending: str, templates: Templates, directory: Path) -> str | None:
    """A mishap while a run trains, which then comes to its end or is stopped by SIGTERM and resumed."""
    run, source, resume = directory / "run", directory / "source", []
    if name == FOREIGN_SOURCE:
        shutil.copytree(templates.stopped, source)
        resume = [f"resume={source}"]
    stop = STEPS - 3 if ending == "stopped" else None
    code, message = _on_ranks([f"run_dir={run}", *resume], stop=stop, mishap=name)
    if code != (0 if stop is None else 75):
        return f"exit code {code}: {message}"
    if stop is not None:
        if problems := [line for path in store.directories(run) for line in store.verify(path)]:
            return f"stopped, and {problems}"
        code, message = _on_ranks([f"run_dir={run}", "resume=auto"])
        if code:
            return f"not resumed: {code}: {message}"
    return _first(*_end(run, templates.finished))


def _is_foreign(path: str) -> bool:
    return path.startswith(("notes.md", "seed1/", "checkpoints/notes.md", "export/mine"))


def _end(run: Path, whole: Path) -> list[str | bool]:
    """Whether a run ended as the one to which nothing happened."""
    ours, theirs = losses(run) if (run / "metrics.jsonl").is_file() else {STEPS: losses(whole)[STEPS]}, losses(whole)
    if status(run)["state"] != "done":
        return [f"it ended as {status(run)}"]
    first, second = (load_file(path / "export" / "model.safetensors") for path in (run, whole))
    return [
        max(ours) != STEPS and "its metrics have no end",
        any(ours[step] != theirs[step] for step in ours) and "its losses differ",
        not all(torch.equal(first[tensor], second[tensor]) for tensor in second) and "its weights differ",
        *(f"{path.name}: {problem}" for path in store.directories(run) for problem in store.verify(path)),
    ]


def _pruned(
    code: int, message: str, accident: Accident, before: dict, after: dict, whole: set, left: set
) -> str | None:
    if code:
        return _first(
            "prune" not in accident.may_refuse and f"it was refused: {message}",
            before != after and "it was refused and deleted something",
        )
    return _first(
        any(after[path] != before.get(path) for path in after if not path.endswith("latest")) and "it changed files",
        whole and not left and "no whole checkpoint is left",
        accident.unreadable
        and (gone := _names(before) - _names(after)) & {max(_names(before))}
        and f"what it could not read is gone: {gone}",
    )


def _names(found: dict[str, str]) -> set[str]:
    """The checkpoints among the files of a run, by name."""
    return {part for path in found for part in Path(path).parts if part.startswith("step_")}


def _train(action: str, accident: str, run: Path) -> tuple[int, str]:
    holder = lock.lock(run) if action == "beside" else contextlib.nullcontext()
    with holder:
        return _on_ranks([f"run_dir={run}", *TRAINING[action]], accident, REQUEUED if action == "requeue" else None)


def _on_ranks(*arguments, **options) -> tuple[int, str]:
    try:
        return max(ranks(2).run(attempt, *arguments, **options))
    except AssertionError as error:  # a rank raised something else, and the ranks were ended
        return 1, str(error)


def _command(action: str, accident: Accident, run: Path, directory: Path) -> tuple[int, str]:
    names = {"RUN": str(run), "OUT": str(directory / "out")}
    log = directory / "said"
    with log.open("w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), accident.disk(run):
        try:
            code = command([names.get(word, word) for word in COMMANDS[action]])
        except Exception:
            code = 1
            traceback.print_exc(file=said)
    return code, log.read_text()


def _changes(before: dict[str, str], after: dict[str, str]) -> str:
    return ", ".join(sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))[:5])


def _first(*problems: str | bool | set | int | None) -> str | None:
    return next((str(problem) for problem in problems if problem), None)


def main() -> int:
    """Try every cell; print the table, with failed cells in capitals, and what is wrong."""
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        templates = make_templates(Path(scratch))
        for rows, columns, try_cell in ((ACCIDENTS, ACTIONS, cell), (MISHAPS, ENDINGS, meanwhile)):
            for name in rows:
                line = []
                for column in columns:
                    with tempfile.TemporaryDirectory(dir=scratch) as directory:
                        problem = try_cell(name, column, templates, Path(directory))
                    line.append(column if problem is None else column.upper())
                    wrong += [f"{name} x {column}: {problem}"] if problem else []
                print(f"{name:<42}{' '.join(line)}", flush=True)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The checkpoints of a run: RUN/checkpoints/{step_00005000/, latest}.

Each is a tag of DeepSpeed's own format plus two things of ours: the fp32 masters of the frozen weights
(written by the engine) and `run.json`, what the trainer needs to build the right engine before anything
is loaded. `latest` names the newest one and is replaced last, so that it never points at half a
checkpoint.
"""

import json
import os
import shutil
import time
from pathlib import Path

import torch.distributed as dist

RUN_STATE = "run.json"


class ResumeError(RuntimeError):
    """A run cannot go on from what was asked for."""


def has_run(directory: Path) -> bool:
    """Whether a directory holds a run of ours."""
    return (directory / "recipe.yaml").is_file() or (directory / "status.json").is_file()


def save(engine, run_dir: Path, state: dict) -> dict:
    """Write a checkpoint. Collective.

    Args:
        state: JSON values; `step` names the checkpoint.

    Returns:
        `{bytes, stall_s, write_s}`; bytes over all ranks.
    """
    started = time.perf_counter()
    directory = run_dir / "checkpoints"
    tag = tag_of(state["step"])
    if dist.get_rank() == 0:
        (directory / tag).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(directory), tag, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        write_json(directory / tag / RUN_STATE, state)
        write_text(directory / "latest", tag)
    dist.barrier()
    size = sum(f.stat().st_size for f in (directory / tag).rglob("*") if f.is_file())
    seconds = time.perf_counter() - started
    return {"bytes": size, "stall_s": seconds, "write_s": seconds}


def prune(run_dir: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every`. Rank 0 calls it."""
    tags = sorted((run_dir / "checkpoints").glob("step_*"))
    for tag in tags[:-keep_last]:
        if not (keep_every and int(tag.name.removeprefix("step_")) % keep_every == 0):
            shutil.rmtree(tag)


def drop_after(run_dir: Path, step: int) -> None:
    """Delete the checkpoints past `step`: they are of a future that will not be. Rank 0 calls it."""
    if (run_dir / "checkpoints" / tag_of(step)).is_dir():  # else the run goes on from a checkpoint of another one
        write_text(run_dir / "checkpoints" / "latest", tag_of(step))
    for tag in (run_dir / "checkpoints").glob("step_*"):
        if int(tag.name.removeprefix("step_")) > step:
            shutil.rmtree(tag)


def find(run_dir: Path, resume: str | bool) -> tuple[Path, dict] | None:
    """The checkpoint to go on from, as `(directory, its run state)`; None to start from the beginning.

    Args:
        resume: False; "auto" for the newest checkpoint of the run, if there is one; or a checkpoint's path.

    Raises:
        ResumeError: when what was asked for is no checkpoint.
    """
    if not resume:
        return None
    if resume == "auto":
        latest = run_dir / "checkpoints" / "latest"
        if not latest.is_file():
            return None
        directory = latest.parent / latest.read_text().strip()
    else:
        directory = Path(resume)
        if (directory / "latest").is_file():
            directory = directory / (directory / "latest").read_text().strip()
    if not (directory / RUN_STATE).is_file():
        raise ResumeError(f"resume: {directory} is no checkpoint (it has no {RUN_STATE}); name a directory "
                          "RUN/checkpoints/step_…, or use resume=auto")
    return directory, json.loads((directory / RUN_STATE).read_text())


def require_same(state: dict, **now) -> None:
    """Refuse to go on where something that this version cannot convert has changed since the checkpoint.

    Args:
        state: the checkpoint's run state. now: the same keys, with this run's values.

    Raises:
        ResumeError: naming every value that differs.
    """
    changed = []
    for name, value in now.items():
        old = state.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            changed += [f"{name}.{key} was {old.get(key)}, is {value.get(key)}" for key in sorted({*value, *old})
                        if old.get(key) != value.get(key)]
        elif old != value:
            changed.append(f"{name} was {old}, is {value}")
    if changed:
        raise ResumeError("resume: " + "; ".join(changed) + ". A checkpoint goes on only as it was begun in this "
                          "version: change it back, or start a new run with init_from")


def require_same_step(run_dir: Path, checkpoint: tuple[Path, dict] | None) -> None:
    """Refuse to go on where the ranks have found checkpoints of different steps, or only some have one. Collective.

    Args:
        checkpoint: what `find` returned on this rank.

    Raises:
        ResumeError: on every rank.
    """
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, checkpoint and checkpoint[1]["step"])
    if len(set(steps)) > 1:
        raise ResumeError(f"resume: the ranks find different checkpoints in {run_dir}, of the steps {steps} (None: "
                          "none); the run directory must be on a disk that all machines share")


def tag_of(step: int) -> str:
    """The directory name of the checkpoint after `step` applied steps."""
    return f"step_{step:08d}"


def write_json(path: Path, value: dict) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file's contents in one rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)

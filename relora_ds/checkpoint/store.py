"""The checkpoints of a run, RUN/checkpoints/{step_00005000/, latest}: which there are, are intact, are kept.

`latest` names the newest one for people and other programs; what counts is the directories themselves, each of which
was put there by one rename.
"""

import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from relora_ds.checkpoint import manifest
from relora_ds.checkpoint.files import write_text
from relora_ds.checkpoint.manifest import LATEST, DamagedError, Manifest, tag_of

_NAME = re.compile(r"step_\d{8,}")  # not a copy that somebody put beside it


class ResumeError(RuntimeError):
    """A run cannot go on from what was asked for."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from.

    Attributes:
        directory, manifest: of it.
        passed_over: one line for each newer one that is damaged, and what else was not as it should be.
        damaged: the directories of those.
    """

    directory: Path
    manifest: Manifest
    passed_over: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()


def has_run(directory: Path) -> bool:
    """Whether a directory holds a run of ours."""
    return (directory / "recipe.yaml").is_file() or (directory / "status.json").is_file()


def directories(run_dir: Path) -> list[Path]:
    """The checkpoints of a run (or in a directory of checkpoints), oldest first, intact or not."""
    inner = run_dir / "checkpoints"
    return sorted(path for path in (inner if inner.is_dir() else run_dir).glob("step_*")
                  if path.is_dir() and _NAME.fullmatch(path.name))


def may_resume(run_dir: Path, resume: str | bool) -> bool:
    """Whether there is something to go on from, as far as one look tells."""
    return bool(resume) and (resume != "auto" or bool(directories(run_dir)))


def find(run_dir: Path, resume: str | bool) -> Found | None:
    """The checkpoint to go on from; None to start from the beginning. Collective.

    Args:
        resume: False; "auto" for the newest intact checkpoint of the run, if there is one; the path of another run, for
            its newest intact one; or that of a checkpoint.

    Raises:
        ResumeError: on every rank, where what was asked for is damaged or none; where every checkpoint is; or where the
            ranks see different ones.
    """
    if not resume:
        return None
    candidates = directories(run_dir if resume == "auto" else Path(resume))[::-1]
    if resume != "auto" and not candidates:
        if not any(_of_all_ranks((Path(resume) / manifest.NAME).exists())):
            raise ResumeError(f"resume: {resume} is no checkpoint (it has no {manifest.NAME}) and no run that has one; "
                              "name RUN or RUN/checkpoints/step_…, or take resume=auto")
        candidates = [Path(resume)]
    seen = _of_all_ranks([path.name for path in candidates])
    common = set.intersection(*map(set, seen))
    if any(seen) and not common:
        raise ResumeError(f"resume: the ranks see different checkpoints: {seen}; the run directory should be on a file "
                          "system that all machines share, or at least hold the same checkpoints on each")
    # On disks of their own, hosts may have been stopped before all of them had completed or deleted one.
    passed_over = [f"{name} is not on every host" for name in sorted({*sum(seen, [])} - common, reverse=True)]
    damaged: list[Path] = []
    for directory in (path for path in candidates if path.name in common):
        about, reasons = None, []
        try:
            about = manifest.read(directory)
        except DamagedError as error:
            reasons = [str(error)]
        if not any(_of_all_ranks(reasons)):
            files = _of_all_ranks(sorted(about.files))
            reasons = _damage(directory, about) if all(names == files[0] for names in files) else \
                [f"{directory / manifest.NAME} lists other files on other hosts"]
        if not (found := sum(_of_all_ranks(reasons), [])):
            return Found(directory, about, (*_stray(directory.parent), *passed_over), tuple(damaged))
        damaged.append(directory)
        passed_over.append(f"{directory} is damaged: {found[0]}")
    if passed_over:
        raise ResumeError(f"resume: {'; '.join(passed_over)}; name an intact checkpoint, RUN/checkpoints/step_…, or "
                          "start again with overwrite=true")
    return None


def verify(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; by this process alone."""
    try:
        about = manifest.read(directory)
    except DamagedError as error:
        return [str(error)]
    return [found for name, file in about.files.items() if (found := manifest.damage(directory, name, file))]


def prune(run_dir: Path, keep_last: int, keep_every: int | None) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every`; returns the deleted.

    One that is damaged at first sight is not kept, and not counted.

    Raises:
        ValueError: all are; nothing is deleted.
    """
    found = directories(run_dir)
    whole = [path for path in found if _looks_whole(path)]
    if found and not whole:
        raise ValueError(f"{run_dir}: no checkpoint is intact, and none is deleted; see `checkpoint verify`")
    kept = {path for path in whole if keep_every and _step_of(path) % keep_every == 0} | {*whole[-keep_last:]}
    gone = [path for path in found if path not in kept]
    for path in gone:
        remove(path)
    return gone


def drop_after(run_dir: Path, step: int, damaged: tuple[Path, ...] = ()) -> None:
    """Delete the checkpoints past `step`: they are of a future that will not be.

    damaged: these are put aside as `step_....damaged` for somebody to look at.
    """
    for path in damaged:
        if path.parent == run_dir / "checkpoints" and path.is_dir():
            aside = path.with_name(f"{path.name}.damaged")
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(path, aside)
    if (run_dir / "checkpoints" / tag_of(step)).is_dir():  # else the run goes on from a checkpoint of another one
        write_text(run_dir / "checkpoints" / LATEST, tag_of(step))
    for path in directories(run_dir):
        if _step_of(path) > step:
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint; what is left when that is interrupted is none."""
    hidden = path.with_name(f".{path.name}.old")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _looks_whole(path: Path) -> bool:
    """Whether nothing is wrong with a checkpoint that can be seen without reading all of it."""
    try:
        listed = manifest.read(path).files
    except DamagedError:
        return False
    for name, file in listed.items():
        if (path / name).is_file():
            if (path / name).stat().st_size != file.size:
                return False
        elif file.host == socket.gethostname():  # else it may be on another host's disk
            return False
    return True


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _damage(directory: Path, about: Manifest) -> list[str]:
    """What is wrong with this rank's share of the files: each is read by one of the ranks that see it. Collective."""
    names = sorted(about.files)
    seen = _of_all_ranks([name for name in names if (directory / name).is_file()])
    found = []
    for i, name in enumerate(names):
        seers = [rank for rank, visible in enumerate(seen) if name in visible] or range(dist.get_world_size())
        if seers[i % len(seers)] == dist.get_rank() and (reason := manifest.damage(directory, name, about.files[name])):
            found.append(reason)
    return found


def _of_all_ranks(value: list) -> list[list]:
    everybody: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def _stray(directory: Path) -> list[str]:
    latest = directory / LATEST
    name = latest.read_text().strip() if latest.is_file() else None
    if name is None or (directory / name).is_dir():
        return []
    return [f"{latest} names {name!r}, which is not there"]

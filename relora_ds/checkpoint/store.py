"""The checkpoints in a directory: which there are, which are intact, which are kept.

Of a run they are RUN/checkpoints/step_00005000, ..., and `latest` names the newest one for people and other programs;
what counts is the directories themselves, each of which was put there by one rename.
"""

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from relora_ds.checkpoint import manifest
from relora_ds.checkpoint.manifest import (
    LATEST,
    DamagedError,
    File,
    MissingError,
    UnreadableError,
    is_needed,
    tag_of,
)
from relora_ds.checkpoint.removal import foreign_in, free, put_aside, remove
from relora_ds.utils.files import write_text

logger = logging.getLogger(__name__)

LATE_S = 60  # for so long network disks may show an old state of what another host has written
NAME_OF_A_STEP = re.compile(r"step_\d{8,}")  # not a copy that somebody put beside it


def has_run(directory: Path) -> bool:
    """Return whether a directory holds a run of relora_ds."""
    return (directory / "recipe.yaml").is_file() or (directory / "status.json").is_file()


def directories(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run (or in a directory of checkpoints), oldest first, intact or not."""
    inner = run_dir / "checkpoints"
    return sorted(
        path
        for path in (inner if inner.is_dir() else run_dir).glob("step_*")
        if path.is_dir() and NAME_OF_A_STEP.fullmatch(path.name)
    )


def tagged(directory: Path) -> list[Path]:
    """Return all checkpoints beside each other, whatever their names, oldest first; intact or not.

    One whose place another one was taking, when that was interrupted, is there under its `replaced_name`.
    """
    found = [path.parent for path in directory.glob(f"*/{manifest.NAME}")]
    names = {path.name for path in found}
    hidden = [path for path in found if path.name.startswith(".")]
    interrupted = [path for path in hidden if path.name.endswith(".replaced") and path.name[1:-9] not in names]
    return sorted([path for path in found if path not in hidden] + interrupted, key=_age)


def _age(directory: Path) -> tuple[int, float]:
    """Return what orders checkpoints by age: the steps, and when they were written."""
    path = directory / manifest.NAME
    try:
        return manifest.read(directory).step, path.stat().st_mtime
    except (ValueError, OSError):
        return -1, 0.0


def named_by(pointer: Path) -> Path | None:
    """Return the directory that a file like `latest` names.

    Returns:
        None where the file is missing or damaged, or names anything but a directory beside it: a pointer that leads
        elsewhere, also by a symbolic link, is not followed.
    """
    try:
        path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
        return path if path.is_dir() and path.resolve().parent == pointer.parent.resolve() else None
    except (OSError, ValueError, RuntimeError):  # RuntimeError: links in a circle
        return None


def may_resume(run_dir: Path, resume: str | bool) -> bool:
    """Return whether there is something to resume from, as far as one look tells."""
    return bool(resume) and (resume != "auto" or bool(directories(run_dir)))


def verify(directory: Path, only: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Return what is wrong with a checkpoint, one line each, as this process alone sees it.

    only: judges the names of the files that are read.
    """
    try:
        about = manifest.read(directory)
    except (DamagedError, UnreadableError) as error:
        return [str(error)]
    found = [error_in(directory, name, file) for name, file in about.files.items() if only(name)]
    return [str(error) for error in found if error is not None]


def prune(
    run_dir: Path,
    keep_last: int,
    keep_every: int | None,
    is_here: Callable[[str], bool] | None = None,
    thorough: bool = False,
    spared: Collection[str] = (),
) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every`; returns the deleted.

    One that is provably damaged, at first sight, is not kept and not counted. One that cannot be read now is neither
    counted nor deleted. One that holds other people's files is not deleted.

    Args:
        is_here: whether a file of that name is on this host's disk, where hosts have disks of their own; None where
            that is not known.
        thorough: read the weights of those that are kept as the newest: a flipped bit is seen in no size.
        spared: names of checkpoints that are not deleted now.

    Raises:
        ValueError: none is intact; nothing is deleted.
    """
    found = directories(run_dir)
    whole: list[Path] = []
    unclear: list[Path] = []
    for path in reversed(found):
        try:
            _glance(path, is_here)
            if thorough and len(whole) < keep_last:
                _read_all(path)
            whole.append(path)
        except UnreadableError as error:
            unclear.append(path)
            logger.warning("%s is neither counted nor deleted: %s", path.name, error)
        except DamagedError:
            continue
    if found and not whole:
        raise ValueError(f"{run_dir}: no checkpoint is intact, and none is deleted; see `checkpoint verify`")
    names = {*kept([path.name for path in whole], keep_last, keep_every), *spared}
    gone = [path for path in found if path.name not in names and path not in unclear and not _holds_more(path)]
    for path in gone:
        remove(path)
    return gone


def kept(newest_first: Sequence[str], keep_last: int, keep_every: int | None) -> set[str]:
    """Return which checkpoints the retention rule keeps, by name."""
    return {name for name in newest_first if keep_every and step_of(name) % keep_every == 0} | {
        *newest_first[:keep_last]
    }


def _holds_more(path: Path) -> bool:
    """Return True, with a warning, for a checkpoint's directory with anything that is no part of one."""
    if foreign := foreign_in(path):
        logger.warning("%s is not deleted: it holds %s, which no run writes; move that elsewhere", path, foreign)
    return foreign is not None


def drop_after(run_dir: Path, step: int, damaged: tuple[Path, ...] = ()) -> None:
    """Move away the checkpoints past `step`, which the run will write anew; no data are deleted.

    They go to `checkpoints/replaced/`. damaged: these become `step_….damaged`.
    """
    inner = run_dir / "checkpoints"
    for path in damaged:
        if path.parent == inner and path.is_dir():
            os.replace(path, free(path.with_name(f"{path.name}.damaged")))
    if (inner / tag_of(step)).is_dir():  # else the run resumes from a checkpoint of another one
        write_text(inner / LATEST, tag_of(step))
    for path in directories(run_dir):
        if step_of(path.name) > step:
            put_aside(path)


def _glance(path: Path, is_here: Callable[[str], bool] | None) -> None:
    """Look whether a checkpoint is whole, as far as can be seen without reading its weights.

    Raises:
        DamagedError: it is not. UnreadableError: that cannot be told now, or not on this host.
    """
    listed = {
        name: file
        for name, file in manifest.read(path).files.items()
        if is_needed(name) and (is_here is None or is_here(name))
    }
    errors = {name: error for name, file in listed.items() if (error := error_in(path, name, file, contents=False))}
    late = [name for name, error in errors.items() if may_be_late(path, listed[name], error)]
    if late:
        raise UnreadableError(f"{errors[late[0]]}, or is not seen yet")
    # Without a shared disk, nothing of other hosts is here.
    hosts = {file.host for name, file in listed.items() if name not in errors}
    elsewhere = [
        name
        for name, error in errors.items()
        if is_here is None and isinstance(error, MissingError) and listed[name].host not in hosts
    ]
    proofs = [error for name, error in errors.items() if name not in elsewhere and isinstance(error, DamagedError)]
    if proofs:
        raise proofs[0]
    if errors:
        raise UnreadableError(str(next(iter(errors.values()))))


def _read_all(path: Path) -> None:
    """Compare the contents of all files that are here with their hashes. Errors: as those of `_glance`."""
    for name, file in manifest.read(path).files.items():
        with contextlib.suppress(MissingError):  # `_glance` has judged what is missing
            if is_needed(name):
                manifest.check(path, name, file)


def may_be_late(path: Path, file: File, error: ValueError) -> bool:
    """Return True for a file that another host has just written: network disks show it some seconds later."""
    young = abs(time.time() - path.stat().st_mtime) < LATE_S
    return isinstance(error, DamagedError) and file.host != socket.gethostname() and young


def step_of(name: str) -> int:
    """Return the step of a checkpoint of a run."""
    return int(name.removeprefix("step_"))


def error_in(directory: Path, name: str, file: File, contents: bool = True) -> DamagedError | UnreadableError | None:
    """Return what is wrong with one file of a checkpoint, or None."""
    try:
        manifest.check(directory, name, file, contents)
    except (DamagedError, UnreadableError) as error:
        return error
    return None

"""The checkpoints of a run, RUN/checkpoints/{step_00005000/, latest}: which there are, are intact, are kept.

`latest` names the newest one for people and other programs; what counts is the directories themselves, each of which
was put there by one rename.
"""

import contextlib
import itertools
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from relora_ds.checkpoint import manifest
from relora_ds.checkpoint.latest import named_by
from relora_ds.checkpoint.manifest import (
    IN_CHECKPOINT,
    LATEST,
    DamagedError,
    File,
    Manifest,
    MissingError,
    UnreadableError,
    is_needed,
    tag_of,
)
from relora_ds.utils.files import write_text

logger = logging.getLogger(__name__)

LATE_S = 60  # for so long network disks may show an old state of what another host has written
REPLACED = "replaced"  # beside the checkpoints: those that a run went back behind
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
    return sorted(
        path
        for path in (inner if inner.is_dir() else run_dir).glob("step_*")
        if path.is_dir() and _NAME.fullmatch(path.name)
    )


def may_resume(run_dir: Path, resume: str | bool) -> bool:
    """Whether there is something to go on from, as far as one look tells."""
    return bool(resume) and (resume != "auto" or bool(directories(run_dir)))


def find(run_dir: Path, resume: str | bool) -> Found | None:
    """The checkpoint to go on from; None to start from the beginning. Collective.

    Args:
        resume: False; "auto" for the newest intact checkpoint of the run, if there is one; the path of another run, for
            its newest intact one; or that of a checkpoint.

    Raises:
        ResumeError: on every rank, where what was asked for is damaged or none; where every checkpoint is; where the
            newest one that is not damaged cannot be read now; or where the ranks see different ones.
    """
    if not resume:
        return None
    candidates = directories(run_dir if resume == "auto" else Path(resume))[::-1]
    if resume != "auto" and not candidates:
        if not any(_of_all_ranks((Path(resume) / manifest.NAME).exists())):
            raise ResumeError(
                f"resume: {resume} is no checkpoint (it has no {manifest.NAME}) and no run that has one; "
                "name RUN or RUN/checkpoints/step_…, or take resume=auto"
            )
        candidates = [Path(resume)]
    seen = _of_all_ranks([path.name for path in candidates])
    common = set.intersection(*map(set, seen))
    if any(seen) and not common:
        raise ResumeError(
            f"resume: the ranks see different checkpoints: {seen}; the run directory should be on a file "
            "system that all machines share, or at least hold the same checkpoints on each"
        )
    # On disks of their own, hosts may have been stopped before all of them had completed or deleted one.
    passed_over = [f"{name} is not on every host" for name in sorted({*sum(seen, [])} - common, reverse=True)]
    damaged: list[Path] = []
    for directory in (path for path in candidates if path.name in common):
        about, errors = _look(directory)
        needed = [error for name, error in errors if is_needed(name)]
        wrong = [error for error in needed if isinstance(error, DamagedError)]
        if needed and not wrong:
            raise ResumeError(
                f"resume: {needed[0]}. Nothing was changed; start again when it can be read, or go on "
                "from an older one with resume=RUN/checkpoints/step_…"
            )
        if not wrong:
            minor = [f"{error}; a run can do without" for _, error in errors]
            return Found(directory, about, (*minor, *_stray(directory.parent), *passed_over), tuple(damaged))
        damaged.append(directory)
        passed_over.append(f"{directory} is damaged: {wrong[0]}")
    if passed_over:
        raise ResumeError(
            f"resume: {'; '.join(passed_over)}; name an intact checkpoint, RUN/checkpoints/step_…, or "
            "start again with overwrite=true"
        )
    return None


def _look(directory: Path) -> tuple[Manifest | None, list[tuple[str, ValueError]]]:
    """Read all of a checkpoint; returns its manifest and, for every file that is not intact, why. Collective."""
    about, errors = None, []
    try:
        about = manifest.read(directory)
    except (DamagedError, UnreadableError) as error:
        errors = [(manifest.NAME, error)]
    if errors := sum(_of_all_ranks(errors), []):
        return None, errors
    listed = _of_all_ranks(sorted(about.files))
    if any(names != listed[0] for names in listed):
        return None, [(manifest.NAME, DamagedError(f"{directory / manifest.NAME} lists other files on other hosts"))]
    return about, sum(_of_all_ranks(_damage(directory, about)), [])


def verify(directory: Path, only: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Return what is wrong with a checkpoint, one line each, as this process alone sees it.

    only: judges the names of the files that are read.
    """
    try:
        about = manifest.read(directory)
    except (DamagedError, UnreadableError) as error:
        return [str(error)]
    return [
        str(error)
        for name, file in about.files.items()
        if only(name) and (error := _error(directory, name, file)) is not None
    ]


def prune(
    run_dir: Path,
    keep_last: int,
    keep_every: int | None,
    is_here: Callable[[str], bool] | None = None,
    thorough: bool = False,
) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every`; returns the deleted.

    One that is provably damaged, at first sight, is not kept and not counted. One that cannot be read now is neither
    counted nor deleted. One that holds other people's files is not deleted.

    Args:
        is_here: whether a file of that name is on this host's disk, where hosts have disks of their own; None where
            that is not known.
        thorough: read the weights of those that are kept as the newest: a flipped bit is seen in no size.

    Raises:
        ValueError: none is intact; nothing is deleted.
    """
    found, whole, unclear = directories(run_dir), [], []
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
    kept = {path for path in whole if keep_every and _step_of(path) % keep_every == 0} | {*whole[:keep_last], *unclear}
    gone = [path for path in found if path not in kept and not _holds_more(path)]
    for path in gone:
        remove(path)
    return gone


def _holds_more(path: Path) -> bool:
    """Whether a checkpoint's directory has anything that no run writes there; says so."""
    if path.is_symlink():  # only the link would be deleted
        return False
    with os.scandir(path) as entries:
        foreign = sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".nfs")
            and (entry.is_dir(follow_symlinks=False) or not IN_CHECKPOINT.fullmatch(entry.name))
        )
    if foreign:
        logger.warning("%s is not deleted: it holds %s, which no run writes; move that elsewhere", path, foreign[0])
    return bool(foreign)


def drop_after(run_dir: Path, step: int, damaged: tuple[Path, ...] = ()) -> None:
    """Put aside the checkpoints past `step`, which the run will write anew; no data are deleted.

    They go to `checkpoints/replaced/`. damaged: these become `step_….damaged`.
    """
    inner = run_dir / "checkpoints"
    for path in damaged:
        if path.parent == inner and path.is_dir():
            os.replace(path, _free(path.with_name(f"{path.name}.damaged")))
    if (inner / tag_of(step)).is_dir():  # else the run goes on from a checkpoint of another one
        write_text(inner / LATEST, tag_of(step))
    for path in directories(run_dir):
        if _step_of(path) > step:
            put_aside(path)


def put_aside(path: Path) -> None:
    """Move a checkpoint to the directory `replaced` beside it."""
    (path.parent / REPLACED).mkdir(exist_ok=True)
    aside = _free(path.parent / REPLACED / path.name)
    os.replace(path, aside)
    logger.warning(
        "%s was moved to %s, because the run goes on from before it; delete it when you need it no more", path, aside
    )


def _free(path: Path) -> Path:
    """Return a path at which there is nothing: this one, or one with a number."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def remove(path: Path) -> None:
    """Delete a checkpoint. An interrupted deletion never leaves a valid checkpoint behind."""
    hidden = path.with_name(f".{path.name}.old")
    delete(hidden)
    os.replace(path, hidden)
    delete(hidden)


def delete(path: Path) -> None:
    """Delete a file, a directory or a symbolic link to one, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    errors = {name: error for name, file in listed.items() if (error := _error(path, name, file, contents=False))}
    late = [name for name, error in errors.items() if _may_be_late(path, listed[name], error)]
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


def _may_be_late(path: Path, file: File, error: ValueError) -> bool:
    """Return True for a file that another host has just written: network disks show it some seconds later."""
    young = abs(time.time() - path.stat().st_mtime) < LATE_S
    return isinstance(error, DamagedError) and file.host != socket.gethostname() and young


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _error(directory: Path, name: str, file: File, contents: bool = True) -> ValueError | None:
    """Return what is wrong with one file of a checkpoint, or None."""
    try:
        manifest.check(directory, name, file, contents)
    except (DamagedError, UnreadableError) as error:
        return error
    return None


def _damage(directory: Path, about: Manifest) -> list[tuple[str, ValueError]]:
    """What is wrong with this rank's share of the files: each is read by one of the ranks that see it. Collective."""
    names = sorted(about.files)
    seen = _of_all_ranks([name for name in names if os.path.lexists(directory / name)])
    found = []
    for i, name in enumerate(names):
        file = about.files[name]
        seers = [rank for rank, visible in enumerate(seen) if name in visible] or range(dist.get_world_size())
        if seers[i % len(seers)] != dist.get_rank():
            continue
        error = _error(directory, name, file)
        while error is not None and _may_be_late(directory, file, error):
            time.sleep(1)
            error = _error(directory, name, file)
        if error is not None:
            found.append((name, error))
    return found


def _of_all_ranks(value: list) -> list[list]:
    everybody: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def _stray(directory: Path) -> list[str]:
    latest = directory / LATEST
    if not os.path.lexists(latest) or named_by(latest) is not None:
        return []
    try:
        name = latest.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        return [f"{latest} cannot be read ({error})"]
    if _NAME.fullmatch(name):
        return [f"{latest} names {name!r}, which is not there"]
    return [f"{latest} names no checkpoint beside it"]

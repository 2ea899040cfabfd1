"""Find the checkpoint to resume from. All ranks look together, and share the reading and hashing of its files."""

import dataclasses
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from relora_ds.checkpoint import manifest
from relora_ds.checkpoint.manifest import LATEST, DamagedError, Manifest, UnreadableError, is_needed
from relora_ds.checkpoint.removal import replaced_name
from relora_ds.checkpoint.store import (
    NAME_OF_A_STEP,
    directories,
    error_in,
    may_be_late,
    named_by,
    tagged,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
Reason = DamagedError | UnreadableError


class ResumeError(RuntimeError):
    """A run cannot resume from what was asked for."""


class NoneIntactError(ResumeError):
    """There are checkpoints, each of them damaged, or not on every host."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        directory, manifest: where it is, and what it contains.
        passed_over: one line for each newer one that is damaged, and what else was not as it should be.
        damaged: the directories of those.
    """

    directory: Path
    manifest: Manifest
    passed_over: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()


def find(run_dir: Path, resume: str | bool) -> Found | None:
    """Return the checkpoint that a run resumes from; None to start from the beginning. Collective.

    Args:
        resume: False; "auto" for the newest intact checkpoint of the run, if there is one; the path of another run, for
            its newest intact one; or that of a checkpoint.

    Raises:
        ResumeError: on every rank, where what was asked for is damaged or none; where every checkpoint is; where the
            newest one that is not damaged cannot be read now; or where the ranks see different ones.
    """
    if not resume:
        return None
    named = Path(str(resume))
    candidates = directories(run_dir if resume == "auto" else named)[::-1]
    if resume != "auto" and not candidates:
        if not any(of_all_ranks((named / manifest.NAME).exists())):
            raise ResumeError(
                f"resume: {resume} is no checkpoint (it has no {manifest.NAME}) and no run that has one; "
                "name RUN or RUN/checkpoints/step_…, or take resume=auto"
            )
        candidates = [named]
    seen = of_all_ranks([path.name for path in candidates])
    common = set.intersection(*map(set, seen))
    if any(seen) and not common:
        raise NoneIntactError(
            f"resume: the ranks see different checkpoints: {seen}; the run directory should be on a file "
            "system that all machines share, or at least hold the same checkpoints on each"
        )
    # On disks of their own, hosts may have been stopped before all of them had completed or deleted one.
    passed_over = [f"{name} is not on every host" for name in sorted({*sum(seen, [])} - common, reverse=True)]
    damaged: list[Path] = []
    for directory in (path for path in candidates if path.name in common):
        try:
            found = _verified(directory)
        except UnreadableError as error:
            raise ResumeError(
                f"resume: {error}. Nothing was changed; start again when it can be read, or resume "
                "from an older one with resume=RUN/checkpoints/step_…"
            ) from error
        except DamagedError as error:
            damaged.append(directory)
            passed_over.append(f"{directory} is damaged: {error}")
        else:
            lines = (*found.passed_over, *_stray(directory.parent), *passed_over)
            return dataclasses.replace(found, passed_over=lines, damaged=tuple(damaged))
    if passed_over:
        raise NoneIntactError(
            f"resume: {'; '.join(passed_over)}; name an intact checkpoint, RUN/checkpoints/step_…, or "
            "start again with overwrite=true"
        )
    return None


def find_tag(load_dir: Path, tag: str | None) -> Found | None:
    """Return a checkpoint that `engine.save_checkpoint` wrote. Collective; rank 0 decides which are looked at.

    Args:
        tag: its name; None for the one that `latest` names or, where that file or the checkpoint is damaged, the newest
            intact one.

    Returns:
        None where `load_dir` has no checkpoint.

    Raises:
        DamagedError: what was asked for is damaged, or all of them are. UnreadableError: one cannot be read now.
    """
    names: list = [None]
    if dist.get_rank() == 0:
        names = [[_present(load_dir, tag)] if tag else _by_age(load_dir)]
    dist.broadcast_object_list(names, 0)
    passed_over: list[str] = []
    for directory in (load_dir / name for name in names[0]):
        try:
            found = _verified(directory)
        except DamagedError as error:
            if tag:
                raise
            passed_over.append(f"{directory} is damaged: {error}")
        else:
            return dataclasses.replace(found, passed_over=(*passed_over, *found.passed_over))
    if passed_over:
        raise DamagedError(f"{'; '.join(passed_over)}; no checkpoint in {load_dir} is intact")
    return None


def _present(directory: Path, tag: str) -> str:
    """Return what a checkpoint is called: an interrupted save under its name may have left it under another one."""
    is_replaced = not (directory / tag).exists() and (directory / replaced_name(tag)).is_dir()
    return replaced_name(tag) if is_replaced else tag


def _by_age(directory: Path) -> list[str]:
    """Return the names of the checkpoints in a directory: the one that `latest` names, then from the newest on."""
    first, newest_first = named_by(directory / LATEST), tagged(directory)[::-1]
    if first is None and newest_first:
        logger.warning("%s names no checkpoint beside it; the newest one serves", directory / LATEST)
    return list(dict.fromkeys(path.name for path in (*([first] if first else []), *newest_first)))


def _verified(directory: Path) -> Found:
    """Read all of a checkpoint; `passed_over` has what a run can do without. Collective.

    Raises:
        DamagedError, UnreadableError: on every rank, where one of them cannot use a file that is needed.
    """
    about = _same_manifest(directory)
    errors = sum(of_all_ranks(_errors(directory, about)), [])
    needed = [error for name, error in errors if is_needed(name)]
    if wrong := [error for error in needed if isinstance(error, DamagedError)] or needed:
        raise wrong[0]
    return Found(directory, about, tuple(f"{error}; a run can do without" for _, error in errors))


def _same_manifest(directory: Path) -> Manifest:
    """Read the manifest on every rank. Errors: see `_verified`."""
    about, error = None, None
    try:
        about = manifest.read(directory)
    except (DamagedError, UnreadableError) as reason:  # the other ranks wait for an answer
        error = reason
    errors = [reason for reason in of_all_ranks(error) if reason is not None]
    if wrong := [reason for reason in errors if isinstance(reason, DamagedError)] or errors:
        raise wrong[0]
    assert about is not None
    listed = of_all_ranks(sorted(about.files))
    if any(names != listed[0] for names in listed):
        raise DamagedError(f"{directory / manifest.NAME} lists other files on other hosts")
    return about


def _errors(directory: Path, about: Manifest) -> list[tuple[str, Reason]]:
    """Return what is wrong with this rank's share of the files: a file is read by one rank that sees it. Collective."""
    names = sorted(about.files)
    seen = of_all_ranks([name for name in names if os.path.lexists(directory / name)])
    found = []
    for i, name in enumerate(names):
        file = about.files[name]
        seers = [rank for rank, visible in enumerate(seen) if name in visible] or range(dist.get_world_size())
        if seers[i % len(seers)] != dist.get_rank():
            continue
        error = error_in(directory, name, file)
        while error is not None and may_be_late(directory, file, error):
            time.sleep(1)
            error = error_in(directory, name, file)
        if error is not None:
            found.append((name, error))
    return found


def of_all_ranks(value: T) -> list[T]:
    """Return the values of all ranks, in their order. Collective."""
    everybody: list = [None] * dist.get_world_size()
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
    if NAME_OF_A_STEP.fullmatch(name):
        return [f"{latest} names {name!r}, which is not there"]
    return [f"{latest} names no checkpoint beside it"]

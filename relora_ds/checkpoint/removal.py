"""Replace checkpoints, set them aside and delete them, by renames: an interruption never leaves half of one."""

import contextlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from relora_ds.checkpoint.manifest import IN_CHECKPOINT, LATEST

logger = logging.getLogger(__name__)

REPLACED = "replaced"  # beside the checkpoints: those that a run went back behind
# What interrupted saves leave: `latest` being written, ranks' marks (`checkpoint.sharing`); directories of checkpoints,
# but for a replaced one, which may be the only one that is whole.
_FILES = re.compile(r"latest\..+\.tmp|\.[0-9a-f-]{36}_rank_\d+")
_DIRECTORIES = re.compile(r"\.step_\d{8,}(\.(?!replaced)\w+)*|\..+\.writing")


def foreign_in(path: Path) -> str | None:
    """Return the name of something in a checkpoint's directory that is no part of one."""
    if path.is_symlink():  # only the link would be deleted
        return None
    with os.scandir(path) as entries:
        foreign = sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".nfs")
            and (entry.is_dir(follow_symlinks=False) or not IN_CHECKPOINT.fullmatch(entry.name))
        )
    return next(iter(foreign), None)


def put_aside(path: Path) -> None:
    """Move a checkpoint to the directory `replaced` beside it."""
    (path.parent / REPLACED).mkdir(exist_ok=True)
    aside = free(path.parent / REPLACED / path.name)
    os.replace(path, aside)
    logger.warning(
        "%s was moved to %s, as the run went back to an earlier step; delete it when you no longer need it", path, aside
    )


@contextlib.contextmanager
def make_way(target: Path, keep: bool) -> Iterator[None]:
    """Free the place of a checkpoint for another one, which is put there inside of the `with`.

    An interruption leaves the old one as `replaced_name(target)`, or the new one. keep: `put_aside` the old one.

    Raises:
        FileExistsError: the directory holds something else; nothing is changed.
    """
    old = target.with_name(replaced_name(target.name))
    if target.exists() and keep:
        put_aside(target)
    elif target.exists():
        if foreign := foreign_in(target):
            raise FileExistsError(f"{target} holds {foreign}, which is no part of a checkpoint; choose another tag")
        delete(old)
        os.replace(target, old)
    try:
        yield
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    delete(old)


def replaced_name(name: str) -> str:
    """Return what a checkpoint is called while another one takes its place."""
    return f".{name}.replaced"


def delete_leftovers(directory: Path) -> None:
    """Delete what interrupted saves left in a directory of checkpoints."""
    for path in [*directory.glob(".*"), *directory.glob(f"{LATEST}.*.tmp")]:
        kind = _DIRECTORIES if path.is_dir() else _FILES
        if kind.fullmatch(path.name) and not (path.is_dir() and foreign_in(path)):
            delete(path)


def free(path: Path) -> Path:
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

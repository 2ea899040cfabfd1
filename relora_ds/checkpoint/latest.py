"""The file `latest` beside checkpoints: what it names, and what serves where it is damaged."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

logger = logging.getLogger(__name__)


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


def newest_tag(load_dir: str, name: str, is_checkpoint: Callable[[Path], bool]) -> str | None:
    """Return the checkpoint that the file `name` names on rank 0's machine, to every rank. Collective.

    DeepSpeed writes that file on one machine only. Where it is damaged, the newest checkpoint beside it serves.

    Args:
        is_checkpoint: judges a directory.

    Returns:
        None where there is no such file, or no checkpoint.
    """
    tag: list = [None]
    if dist.get_rank() == 0:
        pointer = Path(load_dir) / name
        found = named_by(pointer)
        if found is None and os.path.lexists(pointer):
            found = max(
                (path for path in pointer.parent.iterdir() if is_checkpoint(path)),
                key=lambda path: path.stat().st_mtime,
                default=None,
            )
            logger.warning("%s names no checkpoint beside it; the newest one serves: %s", pointer, found)
        tag = [found and found.name]
    dist.broadcast_object_list(tag, 0)
    return tag[0]

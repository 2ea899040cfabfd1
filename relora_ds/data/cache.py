"""Directories that are either complete or absent, also when processes race or die.

A directory is built under a temporary name in the same parent and renamed once. A file lock lets the
processes of one host take turns; between hosts that share a file system the rename alone decides, so a lock
that such a file system ignores costs duplicated work and nothing else.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relora_ds.config import DataConfig


def cache_root(data: DataConfig) -> Path:
    """`data.cache_dir`, else $RELORA_DS_CACHE, else ~/.cache/relora_ds. Not created here."""
    return Path(data.cache_dir or os.environ.get("RELORA_DS_CACHE") or "~/.cache/relora_ds").expanduser()


def ensure_directory(final: Path, is_complete: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """Return `final` after making sure that it is complete.

    `build(temporary)` fills a new, empty directory; it runs only where `is_complete(final)` is false, and
    what it raises leaves no trace behind. A `final` that exists but is not complete (a copy that was
    interrupted, a file that somebody deleted) is replaced.
    """
    if is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with open(final.parent / f".{final.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also when the process is killed
        if is_complete(final):
            return final
        # Under the lock, what this host left under a temporary name belongs to a process that died.
        prefix = f".{final.name}.{socket.gethostname()}."
        for leftover in final.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = final.parent / f"{prefix}{os.getpid()}"
        temporary.mkdir()
        try:
            build(temporary)
            _sync(temporary)
            if final.exists() and not is_complete(final):
                shutil.rmtree(final)
            _rename(temporary, final, is_complete)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _rename(temporary: Path, final: Path, is_complete: Callable[[Path], bool]) -> None:
    """Rename, or accept the directory that another host published in the meantime."""
    try:
        os.rename(temporary, final)
    except OSError:
        if not is_complete(final):
            raise


def _sync(directory: Path) -> None:
    """Flush every file to disk: a power failure must not leave a complete name on empty files."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

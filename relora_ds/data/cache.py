"""Directories that are either complete or absent, also when processes race or die.

A directory is built under a temporary name in the same parent and renamed once. A file lock lets the processes of one
host take turns; between hosts that share a file system the rename alone decides (the temporary name carries the host's
name), so a lock that holds on one host only costs duplicated work and nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import lock_descriptor

from relora_ds.utils.files import sync_below

if TYPE_CHECKING:
    from relora_ds.config import DataConfig


def cache_root(data: DataConfig) -> Path:
    """`data.cache_dir`, else $RELORA_DS_CACHE, else ~/.cache/relora_ds. Not created here."""
    return Path(data.cache_dir or os.environ.get("RELORA_DS_CACHE") or "~/.cache/relora_ds").expanduser()


def local_directory() -> Path:
    """Return where this user's processes on this host meet if the cache does not serve; not created here."""
    return Path(tempfile.gettempdir()) / f"relora_ds-{os.getuid()}"


# What a file system without locks answers, such as a network disk that is mounted without them.
WITHOUT_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of this host at a time; `path` itself need not exist, its parent is made.

    Raises ValueError where that cannot be made, or is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.parent / f".{path.name}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: {str(path.parent)!r} cannot be written ({error.strerror}); name a directory "
            f"that can be, or set RELORA_DS_CACHE to one"
        ) from None
    with lock:
        try:
            lock_descriptor(lock.fileno())  # released when the file closes, also when the process is killed
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            with _local_lock(path):
                yield
        else:
            yield


def ensure_directory(
    final: Path,
    is_complete: Callable[[Path], bool],
    build: Callable[[Path], None],
    is_worth_keeping: Callable[[Path], bool] = lambda partial: False,
) -> Path:
    """Return `final` after making sure that it is complete.

    `build(partial)` fills a directory; it runs only where `is_complete(final)` is false. The directory is new and
    empty, unless a build before it was killed or raised and `is_worth_keeping(partial)` is true of what it left: then
    `build` gets that, and resumes there. A `final` that exists but is not complete (a copy that was interrupted,
    a file that somebody deleted, a link to nothing) is replaced.
    """
    if is_complete(final):
        return final
    with locked(final):
        if is_complete(final):
            return final
        partial = final.parent / f".{final.name}.{socket.gethostname()}.partial"
        if os.path.lexists(partial) and not is_worth_keeping(partial):  # under the lock: its builder is dead
            _remove(partial)
        partial.mkdir(exist_ok=True)
        try:
            build(partial)
            sync_below(partial)  # a power failure must not leave a complete name on empty files
            if os.path.lexists(final) and not is_complete(final):
                _remove(final)
            _rename(partial, final, is_complete)
        except BaseException:
            if not is_worth_keeping(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
    return final


@contextmanager
def _local_lock(path: Path) -> Iterator[None]:
    """Lock a file of this host's temporary directory instead: the processes that take turns are all on this host."""
    directory = local_directory()
    directory.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    with open(directory / f"{name}.lock", "a") as lock:
        lock_descriptor(lock.fileno())
        yield


def _remove(path: Path) -> None:
    """Remove a directory; of a link only the link, and a file too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _rename(partial: Path, final: Path, is_complete: Callable[[Path], bool]) -> None:
    """Rename, or accept the directory that another host published in the meantime."""
    try:
        os.rename(partial, final)
    except OSError:
        if not is_complete(final):
            raise
        shutil.rmtree(partial)

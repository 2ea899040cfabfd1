"""One run directory, one process that writes it.

A run that was started twice, by a scheduler that believed it dead or from another terminal, would write its metrics and
checkpoints into each other.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

NAME = "lock"


class Lock:
    """A locked run directory. It is free again after `close` or `undo`, or when the process dies.

    Attributes:
        before: what the file said: the process that had it last.
    """

    def __init__(self, path: Path, file: IO, made: bool):
        self._path, self._file, self._made = path, file, made
        self._about = os.fstat(file.fileno())
        self.before = _read(file)
        self._write(f"{this_process()}\n")

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the directory."""
        self._file.close()

    def is_held(self) -> bool:
        """Return False once the lock file is gone from its place: a directory that is moved takes it along.

        After `close`, which leaves the file there, too: a run's last words come then.
        """
        try:
            return _is_at(self._path, self._about)
        except OSError:  # the disk does not answer
            return True

    def undo(self) -> None:
        """Free the directory and leave the lock file as it was before, or absent if it was."""
        if self._file.closed:
            return
        if self._made and self.is_held():
            self._path.unlink(missing_ok=True)
        else:
            self._write(self.before)
        self._file.close()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: who has it is for messages only
            self._file.truncate(0)
            self._file.write(text)
            self._file.flush()


def this_process() -> str:
    """Return what stands in the lock file of a run."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def lock(run_dir: Path) -> Lock:
    """Lock an existing run directory.

    A file system without locks gives it to anyone.

    Raises:
        ValueError: another process has it. OSError: the lock file cannot be written.
    """
    path = run_dir / NAME
    while True:
        file, made = _open(path)
        try:
            is_free = lock_descriptor(file.fileno(), blocking=False)
        except OSError:  # without locks
            is_free = True
        if not is_free:
            with file:
                raise ValueError(
                    f"run_dir: {run_dir} is being written by {_read(file).strip() or 'another process'}; stop that "
                    "one, wait for its end, or choose another run_dir"
                )
        if _is_at(path, os.fstat(file.fileno())):
            return Lock(path, file, made)
        file.close()  # another start made the file, locked it and removed it again


def _open(path: Path) -> tuple[IO, bool]:
    """Open the lock file; returns (the file, whether it did not exist before)."""
    try:
        return open(path, "x+", encoding="utf-8"), True
    except FileExistsError:
        return open(path, "a+", encoding="utf-8", errors="replace"), False


def _is_at(path: Path, about: os.stat_result) -> bool:
    try:
        return os.path.samestat(about, path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _read(file: IO) -> str:
    file.seek(0)
    return file.read()

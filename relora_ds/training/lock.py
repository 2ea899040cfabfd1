"""One run directory, one process that writes it.

A run that was started twice, by a scheduler that believed it dead or from another terminal, would write its metrics and
checkpoints into each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from pathlib import Path
from typing import IO

NAME = "lock"


def clear(run_dir: Path) -> None:
    """Delete everything in a run directory but its lock."""
    for path in run_dir.iterdir():
        if path.name != NAME:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def lock(run_dir: Path) -> IO:
    """Take an existing run directory; it is free again when the file that is returned closes, or the process dies.

    Raises ValueError where another process has it. A file system that knows no locks gives it to anyone.
    """
    file = open(run_dir / NAME, "a+", encoding="utf-8")  # noqa: SIM115 (it outlives this function)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            raise ValueError(f"run_dir: {run_dir} is being written by {file.read().strip() or 'another process'}; stop "
                             "that one, wait for its end, or choose another run_dir") from None
    except OSError:
        return file
    with contextlib.suppress(OSError):  # a full disk: who has it is for messages only
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file

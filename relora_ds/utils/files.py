"""Replace, flush and hash files. A file is replaced in one rename, after its contents have reached the disk."""

import contextlib
import hashlib
import json
import os
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import IO, BinaryIO

_CHUNK = 1 << 22


def write_json(path: Path, value: dict) -> None:
    """Replace a file by JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file's contents: a reader, or a crash, finds the old text or the new one, never a part of it.

    Raises:
        OSError: it cannot be written. The old file is left as it was.
    """
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(file: Path | IO) -> None:
    """Wait until a file is on the disk: an open one with what was written to it, or a path (also of a directory)."""
    if isinstance(file, Path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    else:
        file.flush()
        os.fsync(file.fileno())


def sync_below(directory: Path) -> None:
    """Wait until every file below a directory is on the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            sync(path)


def sha256(file: Path | str | BinaryIO) -> str:
    """Return the hexadecimal sha256 of a file's contents; of an open file from its position on."""
    digest = hashlib.sha256()
    with open(file, "rb") if isinstance(file, (Path, str)) else nullcontext(file) as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def short_names(paths: list[Path]) -> list[str]:
    """Return the last component of each path, or as many of the last ones as it takes to tell them apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]

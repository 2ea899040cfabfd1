"""Files that are whole or not there: replaced in one rename, and on the disk before that."""

import contextlib
import hashlib
import json
import os
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 22


def write_json(path: Path, value: dict) -> None:
    """Replace a file by JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file's contents."""
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


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path | BinaryIO) -> str:
    """Of a file's contents, hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

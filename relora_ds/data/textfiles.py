"""Local text files as a corpus: one file is one document."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

# Read as plain text these would train on brackets, quotes or compressed bytes.
STRUCTURED_SUFFIXES = {
    ".json",
    ".jsonl",
    ".parquet",
    ".arrow",
    ".csv",
    ".tsv",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
    ".zip",
}


def find(path: str | os.PathLike, field: str) -> list[Path]:
    """Files named by `path`: a file, a directory (every *.txt below it) or a glob (`**` descends); sorted.

    Empty files are left out: they hold no document. `field` (such as "data.path") opens every error message.
    Raises ValueError: nothing there, a glob or directory without text files, only empty files, not plain
    text.
    """
    name = str(path)
    place = Path(name).expanduser()
    if place.is_file():
        files = [place]
    elif place.is_dir():
        files = sorted(file for file in place.rglob("*.txt") if file.is_file())
        if not files:
            raise ValueError(
                f"{field}: directory {name!r} holds no .txt file; give a glob for files named otherwise"
            )
    elif glob.has_magic(name):
        files = sorted(Path(file) for file in glob.glob(str(place), recursive=True) if os.path.isfile(file))
        if not files:
            raise ValueError(f"{field}: {name!r} matches no file; quote the glob and check it, ** descends")
    else:
        raise ValueError(f"{field}: {name!r} does not exist; give a file, a directory or a glob")
    for file in files:
        if file.suffix.lower() in STRUCTURED_SUFFIXES:
            raise ValueError(
                f"{field}: {str(file)!r} is not plain text; give UTF-8 text files, one document per file"
            )
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise ValueError(f"{field}: {name!r} holds only empty files; give at least one file with text")
    return files


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """The text of each file, in order, unchanged but for a byte order mark; blank files are skipped.

    Raises ValueError for a file that is not UTF-8, naming the file and the first bad byte.
    """
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data.path: {str(file)!r} is not UTF-8 (byte {error.start}); convert it, "
                f"for instance with iconv -f latin1 -t utf-8"
            ) from None
        if text.strip():
            yield text


def sha256(files: Sequence[Path]) -> str:
    """Hash of sizes and contents in order. Names do not matter, the cut between files does."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.stat().st_size}:".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()

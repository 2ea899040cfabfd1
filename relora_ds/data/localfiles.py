"""Local files as a corpus: text, JSON lines and parquet, told apart by their suffix.

    *.txt, anything unknown                    UTF-8 text, one document per file
    *.jsonl *.json, also with .gz              one document per line, in the field `data.text_column`
    *.parquet                                  one document per row, in the column `data.text_column`
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from relora_ds.data.reading import Documents

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
KNOWN_SUFFIXES = (".txt", ".parquet", *JSON_SUFFIXES)
# Read as plain text these would train on separators or compressed bytes.
REFUSED_SUFFIXES = (".arrow", ".csv", ".tsv", ".gz", ".bz2", ".xz", ".zst", ".zip")
# Files are read in groups of at least so many bytes: small ones are tokenized together.
GROUP_BYTES = 1 << 24


def find(path: str | os.PathLike, field: str) -> list[Path]:
    """Files named by `path`: a file, a directory (the known suffixes below it) or a glob (`**` descends); sorted.

    Empty files are left out: they hold no document. A file that is found in several ways (a glob that overlaps itself,
    a link) is there once. `field` (such as "data.path") opens every error message.
    Raises ValueError: nothing there, a glob or directory without text, only empty files, an unreadable kind.
    """
    name = str(path)
    place = Path(name).expanduser()
    if place.is_file():
        files = [place]
    elif place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.name.lower().endswith(KNOWN_SUFFIXES)
                       and file.is_file())
        if not files:
            raise ValueError(f"{field}: directory {name!r} holds no {', '.join(KNOWN_SUFFIXES)} file; give a glob for "
                             f"text files named otherwise")
    elif glob.has_magic(name):
        files = sorted(Path(file) for file in glob.glob(str(place), recursive=True) if os.path.isfile(file))
        if not files:
            raise ValueError(f"{field}: {name!r} matches no file; quote the glob and check it, ** descends")
    else:
        raise ValueError(f"{field}: {name!r} does not exist; give a file, a directory or a glob")
    for file in files:
        if not file.name.lower().endswith(KNOWN_SUFFIXES) and file.suffix.lower() in REFUSED_SUFFIXES:
            raise ValueError(f"{field}: {str(file)!r} is neither plain text nor {', '.join(KNOWN_SUFFIXES[1:])}; "
                             f"convert it to one of them")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise ValueError(f"{field}: {name!r} holds only empty files; give at least one file with text")
    unique: dict[Path, Path] = {}
    for file in files:
        unique.setdefault(file.resolve(), file)
    return list(unique.values())


def kind(file: Path) -> str:
    """How a file is read: as lines of "json" or "json.gz", as "parquet" or as "text"."""
    name = file.name.lower()
    if name.endswith(JSON_SUFFIXES):
        return "json.gz" if name.endswith(".gz") else "json"
    return "parquet" if name.endswith(".parquet") else "text"


def documents_of(files: Sequence[Path], text_column: str) -> Documents:
    """The documents of all files, in order. Reading raises what `read` raises."""
    groups: list[list[Path]] = []
    num_bytes = GROUP_BYTES
    for file in files:
        if num_bytes >= GROUP_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(file)
        num_bytes += file.stat().st_size
    return Documents([partial(_read_all, group, text_column) for group in groups])


def check(files: Sequence[Path], text_column: str) -> None:
    """Look at the first record of one file of each structured kind: a wrong column is found before hashing."""
    for kinds in (("json", "json.gz"), ("parquet",)):
        for file in [file for file in files if kind(file) in kinds][:1]:
            next(read(file, text_column), None)


def read(file: Path, text_column: str) -> Iterator[str]:
    """The documents of one file, unchanged but for a byte order mark; blank ones and null are skipped.

    Raises ValueError, naming the file and where in it: not UTF-8, not JSON, damaged, no such column (names those that
    exist), a value that is not text.
    """
    if kind(file) == "text":
        texts = _read_text(file)
    else:
        texts = (_read_parquet if kind(file) == "parquet" else _read_json)(file, text_column)
    return (text for text in texts if text.strip())


def text_of(value: object, text_column: str, where: str) -> str:
    """`value` if it is text, "" for null. A half of a surrogate pair, which JSON can hold, becomes U+FFFD."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"data.text_column: {text_column!r} holds {type(value).__name__}, not text, in {where}; name "
                         f"a column of text")
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_all(files: Sequence[Path], text_column: str) -> Iterator[str]:
    for file in files:
        yield from read(file, text_column)


def _read_text(file: Path) -> Iterator[str]:
    try:
        yield file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path: {str(file)!r} is not UTF-8 (byte {error.start}); convert it, for instance with "
                         f"iconv -f latin1 -t utf-8") from None


def _read_json(file: Path, text_column: str) -> Iterator[str]:
    number = 0
    try:
        with (gzip.open if kind(file) == "json.gz" else open)(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _field(line, text_column, f"{str(file)!r}, line {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"data.path: {str(file)!r} is damaged after line {number} ({error}); copy it again") from None


def _field(line: bytes, text_column: str, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path: {where} is not UTF-8 (byte {error.start} of the line); convert it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"data.path: {where} is not JSON ({error.msg}); write one object per line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise ValueError(f"data.path: {where} cannot be read as JSON ({first_line(error)}); correct the line or remove "
                         f"it") from None
    if not isinstance(row, dict):
        raise ValueError(f"data.path: {where} is no JSON object; write one object per line, with the text in the field "
                         f"data.text_column {text_column!r}")
    if text_column not in row:
        raise ValueError(no_column(text_column, where, row))
    return text_of(row[text_column], text_column, where)


def _read_parquet(file: Path, text_column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if text_column not in table.schema_arrow.names:
                raise ValueError(no_column(text_column, repr(str(file)), table.schema_arrow.names))
            for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
                for value in batch.column(0).to_pylist():
                    yield text_of(value, text_column, repr(str(file)))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data.path: {str(file)!r} cannot be read as parquet ({first_line(error)}); copy it "
                         f"again") from None


def no_column(text_column: str, where: str, columns: Iterable[str]) -> str:
    """The message for a column that does not exist; names those that do."""
    return f"data.text_column: {text_column!r} is not in {where}; it has: {', '.join(map(str, columns))}"


def first_line(error: BaseException) -> str:
    """What an error of a library says, short."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]

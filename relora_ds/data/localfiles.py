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
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ds.data import utf8
from relora_ds.data.reading import DataWarning, Documents

if TYPE_CHECKING:
    import pyarrow

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
KNOWN_SUFFIXES = (".txt", ".parquet", *JSON_SUFFIXES)
# Read as plain text these would train on separators or compressed bytes.
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
REFUSED_SUFFIXES = (".arrow", ".csv", ".tsv", *COMPRESSED_SUFFIXES)
MAX_NAMED = 8
# Files are read in groups of at least so many bytes: small ones are tokenized together.
GROUP_BYTES = 1 << 24


def find(path: str | os.PathLike, field: str) -> list[Path]:
    """Files named by `path`: a file, a directory (the known suffixes below it) or a glob (`**` descends); sorted.

    Hidden files and folders below a directory are not read: copies of editors and notebooks, and what macOS leaves.
    Other files there that are not read are named in a DataWarning. Empty files are left out: they hold no document. A
    file that is found in several ways (a glob that overlaps itself, a link) is there once. `field` (such as
    "data.path") opens every message.
    Raises ValueError: nothing there, a glob or directory without text, only empty files, an unreadable kind.
    """
    name = str(path)
    place = Path(name).expanduser()
    if place.is_file():
        files = [place]
    elif place.is_dir():
        files = _below(place, field)
    elif glob.has_magic(name):
        files = sorted(Path(file) for file in glob.glob(str(place), recursive=True) if os.path.isfile(file))
        if not files:
            raise ValueError(f"{field}: {name!r} matches no file; quote the glob and check it, ** descends")
    else:
        raise ValueError(f"{field}: {name!r} does not exist; give a file, a directory or a glob")
    for file in files:
        if not file.name.lower().endswith(KNOWN_SUFFIXES) and file.suffix.lower() in REFUSED_SUFFIXES:
            how = "decompress" if file.suffix.lower() in COMPRESSED_SUFFIXES else "convert"
            raise ValueError(
                f"{field}: {str(file)!r} is neither plain text nor {', '.join(KNOWN_SUFFIXES[1:])}; "
                f"{how} it to one of them"
            )
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise ValueError(f"{field}: {name!r} holds only empty files; give at least one file with text")
    unique: dict[object, Path] = {}
    for file in files:
        unique.setdefault(_identity(file), file)
    return list(unique.values())


def without(files: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """Return those of `files` that are none of `others`, also under another name: a link, upper and lower case."""
    resolved = {file.resolve() for file in others}
    inodes = {(stat.st_dev, stat.st_ino) for stat in map(Path.stat, others)}
    return [
        file
        for file in files
        if file.resolve() not in resolved and (file.stat().st_dev, file.stat().st_ino) not in inodes
    ]


def _below(directory: Path, field: str) -> list[Path]:
    """Return the files of known suffixes below a directory; warn of what is left out."""
    found: list[Path] = []
    left_out: list[Path] = []

    def unreadable(error: OSError) -> None:
        raise ValueError(
            f"{field}: {error.filename!r} cannot be read ({error.strerror}); make it readable, or give a "
            f"glob without it"
        )

    for folder, folders, names in os.walk(directory, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            is_known = file.name.lower().endswith(KNOWN_SUFFIXES) and file.is_file()
            (found if is_known else left_out).append(file)
        left_out += [
            link
            for link in (Path(folder, name) for name in folders)
            if link.is_symlink() and not link.resolve().is_relative_to(directory.resolve())
        ]
    if left_out:
        named = _names(sorted(left_out), directory)
    if not found:
        also = f" (not read: {named})" if left_out else ""
        raise ValueError(
            f"{field}: directory {str(directory)!r} holds no {', '.join(KNOWN_SUFFIXES)} file{also}; give "
            f"a glob for text files named otherwise"
        )
    if left_out:
        warnings.warn(
            f"{field}: of the directory {str(directory)!r} only {', '.join(KNOWN_SUFFIXES)} files are read, "
            f"and not: {named}; convert what is text to one of these kinds, or give a glob",
            DataWarning,
            stacklevel=3,
        )
    return sorted(found)


def _names(files: Sequence[Path], directory: Path) -> str:
    """Return the names of a few files and, of the rest, the number of each ending."""
    shown = [str(file.relative_to(directory)) for file in files[:MAX_NAMED]]
    endings = Counter(file.suffix.lower() or "without an ending" for file in files[MAX_NAMED:])
    return ", ".join(shown + [f"{count} more {ending}" for ending, count in endings.most_common()])


def _identity(file: Path) -> object:
    """Return what two names of one file have in common: the inode of hard links, else the resolved path."""
    stat = file.stat()
    return (stat.st_dev, stat.st_ino) if stat.st_nlink > 1 and stat.st_ino else file.resolve()


def kind(file: Path) -> str:
    """Return how a file is read: as lines of "json" or "json.gz", as "parquet" or as "text"."""
    name = file.name.lower()
    if name.endswith(JSON_SUFFIXES):
        return "json.gz" if name.endswith(".gz") else "json"
    return "parquet" if name.endswith(".parquet") else "text"


def documents_of(files: Sequence[Path], text_column: str) -> Documents:
    """Return the documents of all files, in order. Reading raises what `read` raises."""
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
    """Yield the documents of one file, unchanged but for a byte order mark; blank ones and null are skipped.

    Raises ValueError, naming the file and where in it: not readable, not UTF-8, not JSON, damaged, no such column
    (names those that exist), a value that is not text.
    """
    if kind(file) == "text":
        texts = _read_text(file)
    else:
        texts = (_read_parquet if kind(file) == "parquet" else _read_json)(file, text_column)
    try:
        yield from (text for text in texts if text.strip())
    except OSError as error:
        raise ValueError(
            f"data.path: {str(file)!r} cannot be read ({error.strerror or first_line(error)}); make it "
            f"readable, or leave it out"
        ) from None


def text_of(value: object, text_column: str, where: str) -> str:
    """`value` if it is text, "" for null. A half of a surrogate pair, which JSON can hold, becomes U+FFFD."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"data.text_column: {text_column!r} holds {type(value).__name__}, not text, in {where}; name "
            f"a column of text"
        )
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_all(files: Sequence[Path], text_column: str) -> Iterator[str]:
    for file in files:
        yield from read(file, text_column)


def _read_text(file: Path) -> Iterator[str]:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path: {str(file)!r} is not UTF-8 (byte {error.start}); {utf8.advice(file)}") from None
    if "\0" in text and utf8.other_encoding(content):  # UTF-16 of ASCII is UTF-8 too, with zeros between the letters
        raise ValueError(f"data.path: {str(file)!r} is not UTF-8 (zeros between the letters); {utf8.advice(file)}")
    yield text


def _read_json(file: Path, text_column: str) -> Iterator[str]:
    number = 0
    try:
        with (gzip.open if kind(file) == "json.gz" else open)(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _field(line, text_column, file, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"data.path: {str(file)!r} is damaged after line {number} ({error}); copy it again") from None


def _field(line: bytes, text_column: str, file: Path, number: int) -> str:
    where = f"{str(file)!r}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path: {where} is not UTF-8 (byte {error.start} of the line); {utf8.advice(file)}"
        ) from None
    except json.JSONDecodeError as error:
        if b"\0" in line and utf8.other_encoding(line):
            raise ValueError(
                f"data.path: {where} is not UTF-8 (zeros between the letters); {utf8.advice(file)}"
            ) from None
        raise ValueError(f"data.path: {where} is not JSON ({error.msg}); write one object per line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise ValueError(
            f"data.path: {where} cannot be read as JSON ({first_line(error)}); correct the line or remove it"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(
            f"data.path: {where} is no JSON object; write one object per line, with the text in the field "
            f"data.text_column {text_column!r}"
        )
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
            batches = table.iter_batches(batch_size=1024, columns=[text_column])
            for row, value in enumerate(value for batch in batches for value in _values(batch.column(0))):
                if isinstance(value, UnicodeDecodeError):
                    raise ValueError(
                        f"data.path: {str(file)!r} is not UTF-8 (column {text_column}, row {row}); "
                        f"write it again with its text in UTF-8, or without the row"
                    )
                yield text_of(value, text_column, f"{str(file)!r}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"data.path: {str(file)!r} cannot be read as parquet ({first_line(error)}); copy it again"
        ) from None


def _values(column: pyarrow.Array) -> list:
    """Return the values of a column; in place of text that is not UTF-8, the error."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pyarrow.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def no_column(text_column: str, where: str, columns: Iterable[str]) -> str:
    """Return the message for a column that does not exist; names those that do."""
    return f"data.text_column: {text_column!r} is not in {where}; it has: {', '.join(map(str, columns))}"


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, short."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]

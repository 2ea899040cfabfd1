"""Advise how to convert a file that is not UTF-8."""

from __future__ import annotations

import codecs
import gzip
from pathlib import Path

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",  # before UTF-16: one begins with the other
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LOOKED_AT = 1 << 16  # bytes


def other_encoding(beginning: bytes) -> str | None:
    """Return the name that iconv has for UTF-16 or UTF-32, if a file that begins so is in it.

    Without a mark at the beginning ASCII text shows by its zeros: in every second byte, or in three of four.
    """
    for mark, name in _MARKS.items():
        if beginning.startswith(mark):
            return name
    size = 4 if beginning.count(0) > len(beginning) * 0.6 else 2
    columns = [beginning[start:_LOOKED_AT:size] for start in range(size)]
    zeros = [column.count(0) > 0.5 * len(column) for column in columns]
    names = {
        (False, True): "utf-16le",
        (True, False): "utf-16be",
        (False, True, True, True): "utf-32le",
        (True, True, True, False): "utf-32be",
    }
    return names.get(tuple(zeros))


def advice(file: Path) -> str:
    """Return how to convert a file that is not UTF-8."""
    with (gzip.open if file.name.lower().endswith(".gz") else open)(file, "rb") as stream:
        encoding = other_encoding(stream.read(_LOOKED_AT))
    if encoding is None:
        return "convert it, for instance with iconv -f latin1 -t utf-8 where it is Latin-1"
    return f"convert it with iconv -f {encoding} -t utf-8"

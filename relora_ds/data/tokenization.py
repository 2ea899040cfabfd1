"""Documents to token ids in one flat file, with all cores, resumed where a killed process stopped.

The ids are committed piece by piece: `progress.json` says how many of the file's tokens are valid, their sha256, and at
which document to resume. What a killed process wrote beyond that is cut off. The ids of a document depend on its text
alone, so where the pieces end, how often it was interrupted and how many cores took part leave no trace in the
file.

The cores are used by the threads of the fast tokenizers (rayon), which work on a batch of documents at a time; what
stays on one core, turning their result into Python's integers, was an eighth of the whole with a vocabulary of 8192.
Processes of our own would save that and cost the seconds and the memory of importing transformers in each of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from relora_ds.data import tokenizer
from relora_ds.data.pretokenized import checksum
from relora_ds.data.reading import DataWarning, Documents, Place
from relora_ds.utils.files import sync, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Longer documents are tokenized in parts that end at a line end: one string of a gigabyte would take tens of gigabytes
# while it is tokenized. With a tokenizer trained here the ids are the same, with another one a part's first token may
# differ.
MAX_PART_CHARACTERS = 1 << 20
BATCH_CHARACTERS = 1 << 21
# What a killed process loses at the most: about 20 s of one core.
PIECE_CHARACTERS = 1 << 25
PROGRESS = "progress.json"


@dataclass
class SplitProgress:
    """What is committed of one split.

    words: separated by whitespace; bytes: of the UTF-8 text; of all documents. sha256: of the committed tokens.
    """

    tokens: int = 0
    documents: int = 0
    words: int = 0
    bytes: int = 0
    sha256: str = ""
    place: list[int] = field(default_factory=lambda: list(Place()))
    is_done: bool = False


@dataclass
class Progress:
    """What is committed in a directory.

    revision: of the corpus; another one cannot be gone on with. tokenizer_sha256: of the files of a trained tokenizer.
    """

    revision: str
    tokenizer_sha256: dict[str, str] = field(default_factory=dict)
    train: SplitProgress = field(default_factory=SplitProgress)
    validation: SplitProgress = field(default_factory=SplitProgress)

    def commit(self, directory: Path) -> None:
        saved = dataclasses.asdict(self)
        write_text(directory / PROGRESS, json.dumps({**saved, "checksum": checksum(saved)}))


def dtype_of(given: PreTrainedTokenizerBase) -> np.dtype:
    """Return the smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if tokenizer.num_ids(given) < 65536 else np.uint32)


def progress_of(directory: Path, revision: str) -> Progress:
    """Return what was committed in `directory`; a fresh start where that is nothing, or of other contents."""
    try:
        saved = json.loads((directory / PROGRESS).read_text(encoding="utf-8"))
        if saved.pop("checksum") != checksum(saved):
            return Progress(revision)
        train, validation = (SplitProgress(**saved.pop(split)) for split in ("train", "validation"))
        found = Progress(**saved, train=train, validation=validation)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Progress(revision)
    return found if found.revision == revision else Progress(revision)


def has_pieces(directory: Path) -> bool:
    """Return whether a directory that was not finished is worth resuming."""
    return (directory / PROGRESS).is_file()


def write_tokens(
    directory: Path,
    split: str,
    documents: Documents,
    given: PreTrainedTokenizerBase,
    dtype: np.dtype,
    progress: Progress,
    max_tokens: int | None = None,
    whole_documents: bool = False,
) -> None:
    """Write the ids of `documents`, EOS after each, to `<split>.bin`, from where `progress` stands to the end.

    max_tokens: where to stop, exactly, or with `whole_documents` at the end of the document that gets there. No shard
    of the documents is opened that is not needed for them.
    """
    path = directory / f"{split}.bin"
    state: SplitProgress = getattr(progress, split)
    digest = _hash(path, state.tokens * dtype.itemsize)
    if state.tokens and state.sha256 != digest.hexdigest():
        warnings.warn(
            f"data.cache_dir: {str(path)!r}, which was not finished, is not as it was written; it is made again",
            DataWarning,
            stacklevel=2,
        )
        state, digest = SplitProgress(), hashlib.sha256()
        setattr(progress, split, state)
    if state.is_done:
        return
    bar = _progress_bar()
    with open(path, "ab") as file, bar, _all_cores():
        task = bar.add_task(f"tokenizing {split}", total=max_tokens, completed=state.tokens)
        file.truncate(state.tokens * dtype.itemsize)
        num_ids = tokenizer.num_ids(given)
        uncommitted = 0  # characters
        for batch in _batches(documents, Place(*state.place)):
            ids, is_last = _encode(batch, given, state, max_tokens, whole_documents)
            assert not ids or max(ids) < num_ids, "a token id outside the vocabulary"
            tokens = np.asarray(ids, dtype=dtype).tobytes()
            file.write(tokens)
            digest.update(tokens)
            bar.advance(task, len(ids))
            if is_last:
                break
            uncommitted += sum(len(text) for text, _ in batch)
            if uncommitted >= PIECE_CHARACTERS and batch[-1][1] is not None:
                state.place, state.sha256, uncommitted = list(batch[-1][1]), digest.hexdigest(), 0
                sync(file)
                progress.commit(directory)
        sync(file)
    state.is_done, state.sha256 = True, digest.hexdigest()
    progress.commit(directory)


def _progress_bar() -> RichProgress:
    """Return a bar of tokens on a terminal; elsewhere one that shows nothing."""
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _encode(
    batch: list[tuple[str, Place | None]],
    given: PreTrainedTokenizerBase,
    state: SplitProgress,
    max_tokens: int | None,
    whole_documents: bool,
) -> tuple[list[int], bool]:
    """Return (the wanted ids of a batch, whether they are the last that are wanted) and count them in `state`."""
    ids: list[int] = []
    room = sys.maxsize if max_tokens is None else max_tokens - state.tokens
    is_last = False
    for (text, place), part_ids in zip(batch, tokenizer.encode(given, [text for text, _ in batch]), strict=True):
        ids += part_ids
        state.words += len(text.split())
        state.bytes += len(text.encode("utf-8"))
        if place is not None:
            ids.append(given.eos_token_id)
            state.documents += 1
        is_last = len(ids) >= room and not (whole_documents and place is None)
        if is_last:
            break
    if not whole_documents and len(ids) > room:
        del ids[room:]
    state.tokens += len(ids)
    return ids, is_last


def _batches(documents: Documents, start: Place) -> Iterator[list[tuple[str, Place | None]]]:
    """Yield lists of (part of a document, the place after the document that it ends or None), tokenized in parallel.

    About BATCH_CHARACTERS each, and never of two shards: what is in a batch may be all that is wanted.
    """
    batch: list[tuple[str, Place | None]] = []
    num_characters = 0
    for text, place in documents.read(start):
        for part, ends_document in _parts(text) if text is not None else ():
            batch.append((part, place if ends_document else None))
            num_characters += len(part)
            if num_characters >= BATCH_CHARACTERS:
                yield batch
                batch, num_characters = [], 0
        if text is None and batch:
            yield [*batch[:-1], (batch[-1][0], place)]
            batch, num_characters = [], 0


def _parts(document: str) -> Iterator[tuple[str, bool]]:
    start = 0
    while len(document) - start > MAX_PART_CHARACTERS:
        end = document.rfind("\n", start, start + MAX_PART_CHARACTERS) + 1
        if end == 0:  # not one line end in a million characters
            end = start + MAX_PART_CHARACTERS
        yield document[start:end], False
        start = end
    yield document[start:], True


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use its threads, whatever the environment says: nothing forks while it does."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _hash(file: Path, num_bytes: int) -> hashlib._Hash:
    """Return the sha256 of the first `num_bytes` of a file, or of as many as there are; more can be added to it."""
    digest = hashlib.sha256()
    if num_bytes and file.is_file():
        with open(file, "rb") as stream:
            while block := stream.read(min(num_bytes, 1 << 20)):
                digest.update(block)
                num_bytes -= len(block)
    return digest

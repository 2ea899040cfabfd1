"""Corpora: where the documents come from, and which of them are held out for validation.

    wikitext2      600 / 60 Wikipedia articles, 11 / 1 MB, the default demo (wikitext.py)
    gutenberg      17 books, 7.4 MB; the last 5 % of each are for validation (gutenberg.py)
    pydocs         the help topics that Python itself carries, 79 documents, 0.46 MB, no download
    c4             allenai/c4, streamed and stopped at data.max_tokens; from local shards with data.path (hub.py)
    text           local files: text, JSON lines, parquet (localfiles.py)
    org/name       anything that `datasets.load_dataset` takes: streamed with data.max_tokens, loaded without (hub.py)
    pretokenized   a directory written by `python -m relora_ds prepare` (pretokenized.py)

Validation is the corpus' own split, or a fraction of the documents, or other files (`data.validation`). Which
documents are held out does not depend on a seed: runs with different seeds stay comparable.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ds.data import deduplication, file_hashes, gutenberg, hub, localfiles, wikitext
from relora_ds.data.cache import cache_root
from relora_ds.data.hub import Splits
from relora_ds.data.reading import DataWarning, hold_out, in_memory

if TYPE_CHECKING:
    from relora_ds.config import DataConfig

DEFAULT_VALIDATION_FRACTION = 0.05
# Of a stream nobody knows the end, so its validation documents are bounded too: by what the ReLoRA authors evaluate on
# (10 M tokens of C4's validation shards), and for shorter runs by a twentieth of the training tokens.
MAX_STREAMED_VALIDATION_TOKENS = 10_000_000


@dataclass(frozen=True)
class Corpus:
    """A corpus that is not opened yet.

    sha256: of everything that decides the documents of both splits, as far as it can be known without reading them.
        Of a corpus on the hub that is its name: what was tokenized once is used until it is deleted from the cache.
    max_validation_tokens: where to stop in the validation documents; None = at their end.
    open: the documents; downloads them if need be.
    """

    name: str
    sha256: str
    is_streamed: bool
    max_validation_tokens: int | None
    open: Callable[[], Splits]


def documents(data: DataConfig, split: str) -> Iterator[str]:
    """Return the documents of `split`, "train" or "validation"; of a mixture those of one corpus after the other.

    Errors: see `open_corpus`, and those of reading.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split: {split!r} is unknown; use 'train' or 'validation'")
    return itertools.chain.from_iterable(getattr(open_corpus(part).open(), split) for part in data.parts())


def open_corpus(data: DataConfig) -> Corpus:
    """Return the corpus that the `data.` section describes.

    Reads local text files once to hash them (see manifest.py), downloads nothing. Raises ValueError for settings that
    `problems` would report. `open` of it raises ValueError for what cannot be read or downloaded.
    """
    assert data.mix is None, "a mixture has several corpora: DataConfig.parts"
    validation = validation_setting(data)
    held_out_files: list[Path] = []
    if isinstance(validation, str):
        held_out_files = localfiles.find(validation, "data.validation")
        localfiles.check(held_out_files, data.text_column)
    held_out_contents = _contents(held_out_files, data) if held_out_files else []
    identity, open_source = _source(data, held_out_files, held_out_contents)
    is_streamed = data.source == "c4" or (is_datasets_id(data.source) and data.max_tokens is not None)
    limit = None
    if held_out_files:
        identity.append(["files", *held_out_contents])
    else:
        identity.append(["fraction", validation])
        if is_streamed:
            assert data.max_tokens is not None and not isinstance(validation, str)
            limit = (
                min(int(data.max_tokens * DEFAULT_VALIDATION_FRACTION), MAX_STREAMED_VALIDATION_TOKENS)
                if validation is None
                else int(data.max_tokens * validation)
            )

    def open_splits() -> Splits:
        splits = open_source()
        if held_out_files:
            splits = splits._replace(validation=localfiles.documents_of(held_out_files, data.text_column))
        elif validation is not None or splits.validation is None:
            assert not isinstance(validation, str)  # then there were files
            train, held_out = hold_out(splits.train, validation or DEFAULT_VALIDATION_FRACTION)
            splits = splits._replace(train=train, validation=held_out)
        return splits if data.deduplicate is None else _deduplicated(splits, data.deduplicate)

    if data.deduplicate is not None:
        identity.append(["deduplicate", data.deduplicate])
    sha256 = hashlib.sha256(json.dumps([data.source, *identity]).encode()).hexdigest()
    return Corpus(data.source, sha256, is_streamed, limit, open_splits)


def _deduplicated(splits: Splits, threshold: float) -> Splits:
    assert splits.validation is not None
    train, dropped = deduplication.without_copies(splits.train, splits.validation, threshold)
    if not dropped:
        return splits
    warnings.warn(
        f"data.deduplicate: {dropped} training documents resemble another one to {threshold:g} or more; not read",
        DataWarning,
        stacklevel=2,
    )
    return splits._replace(train=train)


def is_hashed(data: DataConfig) -> bool:
    """Return whether `open_corpus` need not read files to hash them: their hashes are remembered."""
    validation = validation_setting(data)
    named = [
        *([text_files(data)] if data.source == "text" else []),
        *([localfiles.find(validation, "data.validation")] if isinstance(validation, str) else []),
    ]
    return all(file_hashes.is_remembered(files, cache_root(data)) for files in named)


def is_datasets_id(source: str) -> bool:
    """Return whether `data.source` is for `datasets.load_dataset`: org/name, or a path."""
    return "/" in str(source)


def validation_setting(data: DataConfig) -> str | float | None:
    """`data.validation` as None, a fraction in (0, 1), or a path. Command lines deliver "0.1" as a string."""
    value = data.validation
    if value is None:
        return None
    try:
        fraction = float(value)
    except ValueError:
        return str(value)
    if isinstance(value, bool) or not 0 < fraction < 1:
        raise ValueError(
            f"data.validation: {value!r} is not a fraction between 0 and 1; give one, such as 0.05, or a path"
        )
    return fraction


def text_files(data: DataConfig) -> list[Path]:
    """Files of `data.path` without those of `data.validation`, which may well lie in the same directory."""
    if not data.path:
        raise ValueError("data.path: missing; data.source=text needs a file, a directory or a glob")
    files = localfiles.find(data.path, "data.path")
    validation = validation_setting(data)
    if not isinstance(validation, str):
        return files
    files = localfiles.without(files, localfiles.find(validation, "data.validation"))
    if not files:
        raise ValueError(
            f"data.path: every file of {data.path!r} is also in data.validation {data.validation!r}; nothing "
            f"is left to train on, name other validation files or a fraction"
        )
    return files


def beginning(texts: Iterator[str], num_bytes: int) -> Iterator[str]:
    """Yield documents until they have so many bytes."""
    for text in texts:
        yield text
        num_bytes -= len(text.encode("utf-8"))
        if num_bytes <= 0:
            return


def _source(data: DataConfig, held_out: list[Path], held_out_contents: list) -> tuple[list, Callable[[], Splits]]:
    """Return (what decides the documents, how to open them). held_out: files of validation text; their contents."""
    if data.source == "wikitext2":  # pinned: the same text from wherever it is taken
        return [], lambda: _named(
            list(wikitext.articles(wikitext.ensure_files(cache_root(data)), split)) for split in ("train", "valid")
        )
    if data.source == "gutenberg":
        return [], lambda: _named(gutenberg.books(gutenberg.ensure_files(cache_root(data))))
    if data.source == "pydocs":
        from pydoc_data.topics import topics

        texts = [topics[key] for key in sorted(topics)]  # other ones with another Python
        return [hashlib.sha256(json.dumps(texts).encode()).hexdigest()], lambda: Splits(in_memory(texts), None, "")
    if data.source == "text":
        files = text_files(data)
        localfiles.check(files, data.text_column)
        files, contents = _without_copies(files, _contents(files, data), held_out_contents)
        return (contents, lambda: Splits(localfiles.documents_of(files, data.text_column), None, ""))
    if data.source == "c4":
        config = data.config or hub.C4_CONFIG
        shards = hub.c4_shards(data.path, config, data.split, held_out) if data.path else None
        decides = [config, data.split, _stats([file for files in (shards or {}).values() for file in files])]
        return decides, lambda: hub.open_splits(
            hub.C4_NAME, config, data.split, data.text_column, streaming=True, files=shards
        )
    assert is_datasets_id(data.source), data.source
    identity: list = [data.config, data.split, data.max_tokens is not None]
    if hub.is_local(data.source):
        root = Path(data.source).expanduser()
        identity.append(_stats(sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]))
    return identity, lambda: hub.open_splits(
        data.source, data.config, data.split, data.text_column, streaming=data.max_tokens is not None, held_out=held_out
    )


def _named(splits) -> Splits:
    train, validation = splits
    return Splits(in_memory(train), in_memory(validation), "")


def _contents(files: list[Path], data: DataConfig) -> list[list[str]]:
    """Kinds and hashes: the same bytes are other documents under another suffix."""
    hashes = file_hashes.sha256_of(files, cache_root(data))
    return [[localfiles.kind(file), sha256] for file, sha256 in zip(files, hashes, strict=True)]


def _without_copies(files: list[Path], contents: list, held_out_contents: list) -> tuple[list[Path], list]:
    """Leave out training files that are copies of validation text; warns of them.

    Where a fraction of the documents is held out, those are copies of other files: a document would be held out of one
    and trained on in the other. A run that validates on a copy of all that it trains on may do so.
    """
    known = {sha256 for _, sha256 in held_out_contents}
    kept: list[tuple] = []
    copies: list[tuple] = []
    for file, content in zip(files, contents, strict=True):
        (copies if content[1] in known else kept).append((file, content))
        if not held_out_contents:
            known.add(content[1])
    if not copies:
        return files, contents
    named = ", ".join(str(file) for file, _ in copies[:8]) + (f" and {len(copies) - 8} more" if copies[8:] else "")
    what = "a validation file" if held_out_contents else "another file, part of which is held out for validation"
    warnings.warn(
        f"data.path: {named}: the same contents as {what}; "
        + ("not read" if kept else "all training text is validation text, name other files in data.validation"),
        DataWarning,
        stacklevel=2,
    )
    kept = kept or copies
    return [file for file, _ in kept], [content for _, content in kept]


def _stats(files: list[Path]) -> list:
    """Names, sizes and mtimes: a corpus that is not read to its end is not hashed either."""
    return [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]

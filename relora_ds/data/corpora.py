"""Corpora: where the documents come from, and which of them are held out for validation.

    wikitext2   600 / 60 Wikipedia articles, 11 / 1 MB, the default demo (wikitext.py)
    pydocs      the help topics that Python itself carries, 79 documents, 0.46 MB, no download
    text        local UTF-8 files, one document per file

Validation is the corpus' own split, or a fraction of the documents, or other files (`data.validation`). Which
documents are held out does not depend on a seed: runs with different seeds stay comparable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ds.data import textfiles, wikitext
from relora_ds.data.cache import cache_root

if TYPE_CHECKING:
    from relora_ds.config import DataConfig

SOURCES = ("wikitext2", "pydocs", "text")
DEFAULT_VALIDATION_FRACTION = 0.05
# Below this many documents a fraction of them is too coarse, and the text itself is cut.
MIN_DOCUMENTS_TO_SPLIT = 20


@dataclass(frozen=True)
class Corpus:
    """`train()` and `validation()` each start a new pass over the documents, in a fixed order."""

    name: str
    sha256: str  # of everything that decides the documents of both splits
    train: Callable[[], Iterator[str]]
    validation: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class _Documents:
    count: int
    sha256: str
    read: Callable[[], Iterator[str]]


def documents(data: DataConfig, split: str) -> Iterator[str]:
    """The documents of `split`, "train" or "validation". Errors: see `open_corpus`."""
    if split not in ("train", "validation"):
        raise ValueError(f"split: {split!r} is unknown; use 'train' or 'validation'")
    return getattr(open_corpus(data), split)()


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that the `data.` section describes; downloads it if need be.

    Reads everything once to hash it. Raises ValueError for settings that `problems` would report and for
    files that are not UTF-8, RuntimeError when a download fails.
    """
    validation = validation_setting(data)
    train, own_validation = _read_source(data)
    if isinstance(validation, str):
        files = textfiles.find(validation, "data.validation")
        held_out = _Documents(len(files), textfiles.sha256(files), lambda: textfiles.read_documents(files))
    elif validation is None and own_validation is not None:
        held_out = own_validation
    else:
        fraction = DEFAULT_VALIDATION_FRACTION if validation is None else validation
        return Corpus(
            name=data.source,
            sha256=_sha256([data.source, train.sha256, "fraction", repr(fraction)]),
            train=lambda: _part(train, fraction, held_out=False),
            validation=lambda: _part(train, fraction, held_out=True),
        )
    sha256 = _sha256([data.source, train.sha256, "documents", held_out.sha256])
    return Corpus(data.source, sha256, train.read, held_out.read)


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


def problems(data: DataConfig) -> list[str]:
    """Everything wrong with the `data.` section that can be seen without a download, one message each."""
    found: list[str] = []
    if data.source not in SOURCES:
        found.append(f"data.source: {data.source!r} is unknown; use one of {', '.join(SOURCES)}")
    elif data.source == "text" and not data.path:
        found.append("data.path: missing; data.source=text needs a file, a directory or a glob")
    elif data.source != "text" and data.path:
        found.append(
            f"data.path: {data.path!r} is read only with data.source=text; set that or remove data.path"
        )
    found += _errors_of(validation_setting, data)
    if data.source == "text" and data.path:
        found += _errors_of(_text_files, data)
    if _names_validation_files(data):
        found += _errors_of(textfiles.find, data.validation, "data.validation")
    if data.text_column != "text":
        found.append(f"data.text_column: {data.text_column!r} has no effect on {data.source!r}; remove it")
    found += _tokenizer_problems(data)
    if not _is_int(data.seq_len) or data.seq_len < 2:
        found.append(
            f"data.seq_len: {data.seq_len!r} is not a whole number of at least 2 tokens, such as 256"
        )
    elif data.max_tokens is not None and (not _is_int(data.max_tokens) or data.max_tokens < data.seq_len):
        found.append(
            f"data.max_tokens: {data.max_tokens!r} does not hold one sequence of data.seq_len "
            f"{data.seq_len}; raise it or remove it"
        )
    if not data.packing:
        found.append("data.packing: false is not available yet; set it to true")
    if cache_root(data).exists() and not cache_root(data).is_dir():
        found.append(f"data.cache_dir: {str(cache_root(data))!r} is not a directory; name one")
    return list(dict.fromkeys(found))


def _tokenizer_problems(data: DataConfig) -> list[str]:
    if data.tokenizer is None:
        # 256 bytes and the four special tokens; whether the corpus' characters fit too is known after
        # reading it.
        if not _is_int(data.vocab_size) or data.vocab_size <= 260:
            return [
                f"data.vocab_size: {data.vocab_size!r} is not a whole number above 260 "
                f"(256 bytes and 4 special tokens), such as 8192"
            ]
        return []
    name = str(data.tokenizer)
    place = Path(name).expanduser()
    # "gpt2" and "org/name" may be names on the hub; these cannot.
    only_a_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if place.is_file() or (only_a_path and not place.exists()):
        return [
            f"data.tokenizer: {name!r} is not a directory; give a tokenizer's directory or a Hugging Face id"
        ]
    return []


def _errors_of(function: Callable, *arguments: object) -> list[str]:
    try:
        function(*arguments)
    except ValueError as error:
        return [str(error)]
    return []


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names_validation_files(data: DataConfig) -> bool:
    try:
        return isinstance(validation_setting(data), str)
    except ValueError:
        return False


def _read_source(data: DataConfig) -> tuple[_Documents, _Documents | None]:
    """The training documents, and the validation split if the corpus has one of its own."""
    if data.source == "wikitext2":
        directory = wikitext.ensure_files(cache_root(data))
        return tuple(_in_memory(list(wikitext.articles(directory, split))) for split in ("train", "valid"))
    if data.source == "pydocs":
        from pydoc_data.topics import topics

        return _in_memory([topics[key] for key in sorted(topics)]), None
    if data.source == "text":
        files = _text_files(data)
        return _Documents(len(files), textfiles.sha256(files), lambda: textfiles.read_documents(files)), None
    raise ValueError(f"data.source: {data.source!r} is unknown; use one of {', '.join(SOURCES)}")


def _text_files(data: DataConfig) -> list[Path]:
    """Files of `data.path` without those of `data.validation`, which may well lie in the same directory."""
    if not data.path:
        raise ValueError("data.path: missing; data.source=text needs a file, a directory or a glob")
    files = textfiles.find(data.path, "data.path")
    if not _names_validation_files(data):
        return files
    held_out = {file.resolve() for file in textfiles.find(data.validation, "data.validation")}
    files = [file for file in files if file.resolve() not in held_out]
    if not files:
        raise ValueError(
            f"data.path: every file of {data.path!r} is also in data.validation {data.validation!r}; nothing "
            f"is left to train on, name other validation files or a fraction"
        )
    return files


def _in_memory(texts: list[str]) -> _Documents:
    return _Documents(len(texts), _sha256(texts), lambda: iter(texts))


def _sha256(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8")
        digest.update(f"{len(encoded)}:".encode())
        digest.update(encoded)
    return digest.hexdigest()


def _part(source: _Documents, fraction: float, held_out: bool) -> Iterator[str]:
    """One side of the split: every 1/fraction-th document, or for few documents the last part of the text."""
    if source.count < MIN_DOCUMENTS_TO_SPLIT or int(source.count * fraction) == 0:
        yield from _cut(list(source.read()), fraction)[held_out]
        return
    for index, document in enumerate(source.read()):
        if (int((index + 1) * fraction) > int(index * fraction)) == held_out:
            yield document


def _cut(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Cut the concatenation of `texts` after the line that ends nearest to `1 - fraction` of its characters.

    A text without line ends is cut at a space, one without spaces anywhere. Both sides get at least one
    character if there are two.
    """
    remaining = round(sum(map(len, texts)) * (1 - fraction))
    for index, text in enumerate(texts):
        if remaining < len(text) or index == len(texts) - 1:
            at = _nearest_boundary(text, remaining)
            train, held_out = [*texts[:index], text[:at]], [text[at:], *texts[index + 1 :]]
            return [text for text in train if text.strip()], [text for text in held_out if text.strip()]
        remaining -= len(text)
    return [], []


def _nearest_boundary(text: str, target: int) -> int:
    for separator in ("\n", " "):
        ends = {text.rfind(separator, 0, target) + 1, text.find(separator, target) + 1} - {0, len(text)}
        if ends:
            return min(ends, key=lambda end: (abs(end - target), end))
    return target

"""Documents to memory-mapped token ids, once per host.

A cache entry is a directory `CACHE/tokens/<fingerprint>/`:

    train.bin, validation.bin   token ids in document order, EOS after every document; uint16 or uint32
    tokenizer/                  the trained tokenizer, where the recipe names none
    metadata.json               counts and the settings that led here; written last

The fingerprint covers the contents of the corpus and everything that changes the ids. It does not cover
`seq_len`: sequences are windows that the loader cuts.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relora_ds.data import corpora, tokenizer
from relora_ds.data.cache import cache_root, ensure_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from relora_ds.config import DataConfig

FORMAT_VERSION = 1
# Longer documents are tokenized in pieces that end at a line end: one string of a gigabyte would take tens
# of gigabytes while it is tokenized. With a tokenizer trained here the ids are the same, with another one a
# piece's first token may differ.
MAX_PIECE_CHARACTERS = 1 << 20
BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class PreparedData:
    """A tokenized corpus; both splits are 1-D, read-only, uint16 (vocabulary < 65536) or uint32."""

    train: np.memmap
    validation: np.memmap
    validation_words: int  # separated by whitespace
    validation_bytes: int  # of the UTF-8 text
    tokenizer_dir: (
        Path | str
    )  # what `tokenizer.load` takes: a directory, or the Hugging Face id of the recipe
    vocab_size: int
    eos_id: int
    fingerprint: (
        str  # sha256; equal on two hosts if and only if they read the same corpus with the same settings
    )


def prepare(data: DataConfig, seed: int = 0) -> PreparedData:
    """Tokenize the corpus of the `data.` section, or find it in the cache.

    Call it in one process per host first; the others then find the cache. (Calls that race wait for each
    other.) `seed` is part of the interface but changes nothing on purpose: the tokens, the tokenizer and the
    held-out documents are the same for every seed, so that seeds can be compared; the loader's order is what
    it seeds.

    Raises ValueError with every message of `corpora.problems`, and for a corpus without text, without
    validation text, or with fewer training tokens than one sequence; RuntimeError when a download fails.
    """
    del seed
    if found := corpora.problems(data):
        raise ValueError("\n".join(found))
    corpus = corpora.open_corpus(data)
    given = None if data.tokenizer is None else tokenizer.load(data.tokenizer)
    key = _key(data, corpus, given)
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    directory = ensure_directory(
        cache_root(data) / "tokens" / fingerprint,
        _is_complete,
        lambda path: _build(path, data, corpus, given, key),
    )
    metadata = _read_metadata(directory)
    prepared = PreparedData(
        train=_map(directory / "train.bin", metadata["dtype"]),
        validation=_map(directory / "validation.bin", metadata["dtype"]),
        validation_words=metadata["validation_words"],
        validation_bytes=metadata["validation_bytes"],
        tokenizer_dir=directory / "tokenizer" if given is None else _directory_or_id(data.tokenizer),
        vocab_size=metadata["vocab_size"],
        eos_id=metadata["eos_id"],
        fingerprint=fingerprint,
    )
    if len(prepared.train) < data.seq_len:
        raise ValueError(
            f"data.seq_len: {data.seq_len} is more than the {len(prepared.train)} training tokens of "
            f"{data.source!r} ({len(prepared.validation)} are held out); shorten it or use a larger corpus"
        )
    return prepared


def _key(data: DataConfig, corpus: corpora.Corpus, given: PreTrainedTokenizerBase | None) -> dict:
    """What the token ids depend on."""
    if given is None:
        tokenizer_key = {
            "vocab_size": data.vocab_size,
            "training": tokenizer.TRAINING,
            "config": tokenizer.CONFIG,
        }
    else:
        # What the tokenizer does rather than its files: the same for a directory and the hub id it came
        # from, and a model directory need not have its gigabytes of weights hashed.
        backend = getattr(given, "backend_tokenizer", None)
        state = (
            backend.to_str() if backend is not None else json.dumps([type(given).__name__, given.get_vocab()])
        )
        tokenizer_key = {"sha256": hashlib.sha256(state.encode()).hexdigest(), "eos_id": given.eos_token_id}
    return {
        "format": FORMAT_VERSION,
        "source": data.source,
        "corpus": corpus.sha256,
        "text_column": data.text_column,
        "max_tokens": data.max_tokens,
        "tokenizer": tokenizer_key,
    }


def _build(
    directory: Path,
    data: DataConfig,
    corpus: corpora.Corpus,
    given: PreTrainedTokenizerBase | None,
    key: dict,
) -> None:
    if given is None:
        given = tokenizer.train(corpus.train(), data.vocab_size, directory / "tokenizer")
    dtype = np.dtype(np.uint16 if len(given) < 65536 else np.uint32)
    counts = {"documents": 0, "words": 0, "bytes": 0}
    num_train = _write_tokens(directory / "train.bin", corpus.train(), given, dtype, "train", data.max_tokens)
    num_validation = _write_tokens(
        directory / "validation.bin", _counted(corpus.validation(), counts), given, dtype, "validation"
    )
    if num_train == 0 or num_validation == 0:
        raise ValueError(
            f"data.source: {data.source!r} gives {num_train} training and {num_validation} validation "
            f"tokens; both need text, use a larger corpus or set data.validation"
        )
    metadata = {
        "train_tokens": num_train,
        "validation_tokens": num_validation,
        "validation_documents": counts["documents"],
        "validation_words": counts["words"],
        "validation_bytes": counts["bytes"],
        "dtype": dtype.name,
        "vocab_size": len(given),
        "eos_id": given.eos_token_id,
        "trained_tokenizer": data.tokenizer is None,
        "key": key,
    }
    (directory / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _write_tokens(
    path: Path,
    documents: Iterable[str],
    given: PreTrainedTokenizerBase,
    dtype: np.dtype,
    description: str,
    max_tokens: int | None = None,
) -> int:
    """Write the ids of `documents`, EOS after each, cut at `max_tokens`; return how many were written."""
    from tqdm import tqdm

    num_tokens = 0
    bar = tqdm(desc=f"tokenizing {description}", unit="B", unit_scale=True, disable=not sys.stderr.isatty())
    with open(path, "wb") as file, bar:
        for batch in _batches(documents):
            ids: list[int] = []
            for (_, ends_document), piece_ids in zip(
                batch, tokenizer.encode(given, [text for text, _ in batch]), strict=True
            ):
                ids += piece_ids
                if ends_document:
                    ids.append(given.eos_token_id)
            if max_tokens is not None:
                ids = ids[: max_tokens - num_tokens]
            assert not ids or max(ids) < len(given), "a token id outside the vocabulary"
            np.asarray(ids, dtype=dtype).tofile(file)
            num_tokens += len(ids)
            bar.update(sum(len(text) for text, _ in batch))
            if num_tokens == max_tokens:
                break
    return num_tokens


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (piece, whether it ends its document) of about BATCH_CHARACTERS, tokenized in parallel."""
    batch: list[tuple[str, bool]] = []
    num_characters = 0
    for document in documents:
        for piece in _pieces(document):
            batch.append(piece)
            num_characters += len(piece[0])
            if num_characters >= BATCH_CHARACTERS:
                yield batch
                batch, num_characters = [], 0
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    start = 0
    while len(document) - start > MAX_PIECE_CHARACTERS:
        end = document.rfind("\n", start, start + MAX_PIECE_CHARACTERS) + 1
        if end == 0:  # not one line end in a million characters
            end = start + MAX_PIECE_CHARACTERS
        yield document[start:end], False
        start = end
    yield document[start:], True


def _counted(documents: Iterable[str], counts: dict[str, int]) -> Iterator[str]:
    for document in documents:
        counts["documents"] += 1
        counts["words"] += len(document.split())
        counts["bytes"] += len(document.encode("utf-8"))
        yield document


def _is_complete(directory: Path) -> bool:
    """Metadata is written last, so its presence and the sizes that it states decide."""
    try:
        metadata = _read_metadata(directory)
        itemsize = np.dtype(metadata["dtype"]).itemsize
        sizes_agree = all(
            (directory / f"{split}.bin").stat().st_size == metadata[f"{split}_tokens"] * itemsize
            for split in ("train", "validation")
        )
        return sizes_agree and (
            not metadata["trained_tokenizer"] or (directory / "tokenizer" / "tokenizer.model").is_file()
        )
    except (OSError, ValueError, KeyError):
        return False


def _read_metadata(directory: Path) -> dict:
    return json.loads((directory / "metadata.json").read_text(encoding="utf-8"))


def _map(path: Path, dtype: str) -> np.memmap:
    return np.memmap(path, dtype=dtype, mode="r")


def _directory_or_id(name: str) -> Path | str:
    place = Path(name).expanduser()
    return place if place.is_dir() else name

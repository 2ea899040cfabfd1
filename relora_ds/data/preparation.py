"""One corpus as memory-mapped token ids, made once per host.

A cache entry is a directory `CACHE/tokens/<key>/`:

    train.bin, validation.bin   token ids in document order, EOS after every document; uint16 or uint32
    tokenizer/                  the trained tokenizer, where the recipe names none
    metadata.json               counts, hashes and the settings that led here; written last

The key covers everything that decides the ids and can be known without reading a stream; it finds the entry. The
fingerprint covers the ids themselves; it says whether two hosts train on the same. Neither covers `seq_len`
nor `packing`: sequences are rows that the loader cuts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from relora_ds.data import corpora, encoding, pretokenized, tokenization, tokenizer
from relora_ds.data.cache import cache_root, ensure_directory
from relora_ds.data.reading import Documents
from relora_ds.data.rows import Layout, Padding, layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from relora_ds.config import DataConfig

FORMAT_VERSION = 2


@dataclass(frozen=True)
class PreparedData:
    """A tokenized corpus; both splits are 1-D, read-only, uint16 (vocabulary < 65536) or uint32.

    validation_words, validation_bytes: of the validation text, separated by whitespace and in UTF-8.
    tokenizer_dir: what `tokenizer.load` takes: a directory, or the Hugging Face id of the recipe.
    fingerprint: sha256; equal on two hosts if and only if the token ids of both splits are the same.
    directory: where the files are.
    layout: what rows have to do with documents (data.packing), see `rows`.
    parts: the corpora of a mixture, whose training tokens are there and not in `train`; `validation` has all of them.
    sets: more texts to evaluate on.
    """

    train: np.ndarray
    validation: np.ndarray
    validation_words: int
    validation_bytes: int
    tokenizer_dir: Path | str
    vocab_size: int
    eos_id: int
    fingerprint: str
    directory: Path
    layout: Layout = None
    parts: tuple[Part, ...] = ()
    sets: tuple[NamedTokens, ...] = ()

    @property
    def padding(self) -> Padding | None:
        """How rows of single documents are padded (data.packing=false); None = rows are windows."""
        return self.layout if isinstance(self.layout, Padding) else None

    @property
    def train_tokens(self) -> int:
        """Number of training tokens."""
        return sum(map(len, self.trains()))

    def trains(self) -> list[np.ndarray]:
        """Return the training tokens of each corpus."""
        return [part.data.train for part in self.parts] or [self.train]

    @property
    def weights(self) -> list[float] | None:
        """The share of the training rows that each corpus of a mixture has; None of one corpus."""
        return [part.weight for part in self.parts] or None

    def validation_parts(self) -> list[tuple[str | None, np.ndarray]]:
        """Return (name, validation tokens) of each corpus of a mixture, else (None, those of the only one)."""
        return [(part.name, part.data.validation) for part in self.parts] or [(None, self.validation)]


class NamedTokens(NamedTuple):
    """A validation set: what metrics call it, and its token ids with EOS after every document."""

    name: str
    tokens: np.ndarray


class Part(NamedTuple):
    """A corpus of a mixture, and its share of the training rows."""

    name: str
    weight: float
    data: PreparedData


def prepare_corpus(data: DataConfig, trust_remote_code: bool = False) -> PreparedData:
    """Tokenize one corpus, in whose section `checks.problems` finds nothing, or find it in the cache.

    Errors: see `mixture.prepare`.
    """
    tokenizer_dir: Path | str
    if data.source == "pretokenized":
        assert data.path is not None  # `problems` has said so
        directory = Path(data.path).expanduser()
        metadata = pretokenized.verified_metadata(data.path, cache_root(data))
        tokenizer_dir = directory / "tokenizer"
    else:
        directory, tokenizer_dir = _tokenized(data, trust_remote_code)
        metadata = pretokenized.read_metadata(directory)
    train: np.ndarray = _map(directory, "train", metadata)
    fingerprint = metadata["fingerprint"]
    if data.source == "pretokenized" and data.max_tokens is not None and data.max_tokens < len(train):
        train = train[: data.max_tokens]
        fingerprint = _sha256([fingerprint, data.max_tokens])
    if len(train) < data.seq_len and data.packing:
        raise ValueError(
            f"data.seq_len: {data.seq_len} is more than the {len(train)} training tokens of "
            f"{data.path or data.source!r} ({metadata['validation_tokens']} are held out); shorten it or use a larger "
            f"corpus"
        )
    return PreparedData(
        train=train,
        validation=_map(directory, "validation", metadata),
        validation_words=metadata["validation_words"],
        validation_bytes=metadata["validation_bytes"],
        tokenizer_dir=tokenizer_dir,
        vocab_size=metadata["vocab_size"],
        eos_id=metadata["eos_id"],
        fingerprint=fingerprint,
        directory=directory,
        layout=layout_of(data, metadata["eos_id"], metadata["pad_id"]),
    )


@dataclass(frozen=True)
class Extent:
    """How much training text a corpus holds: tokens, and rows of `data.seq_len` or of documents."""

    tokens: int
    sequences: int


def known_extent(data: DataConfig, trust_remote_code: bool = False) -> Extent | None:
    """Return the extent of a corpus that was tokenized before; None for any other. Reads no text, writes nothing.

    Raises ValueError for a corpus or tokenizer that cannot be opened.
    """
    if data.source == "pretokenized":
        metadata = pretokenized.read_metadata(data.path)
    else:
        is_here = data.tokenizer is None or Path(data.tokenizer).expanduser().is_dir()
        if not is_here or not (cache_root(data) / "tokens").is_dir() or not corpora.is_hashed(data):
            return None
        given = None if data.tokenizer is None else tokenizer.load(data.tokenizer, trust_remote_code)
        directory = cache_root(data) / "tokens" / _sha256(_key(data, corpora.open_corpus(data), given))
        if not (directory / pretokenized.METADATA).is_file():
            return None
        metadata = pretokenized.read_metadata(directory)
    tokens = min(metadata["train_tokens"], data.max_tokens or metadata["train_tokens"])
    return Extent(tokens, tokens // data.seq_len if data.packing else metadata["train_documents"])


def _tokenized(data: DataConfig, trust_remote_code: bool) -> tuple[Path, Path | str]:
    """Return (the cache entry, built if need be; where its tokenizer is)."""
    corpus = corpora.open_corpus(data)
    given = None if data.tokenizer is None else tokenizer.load(data.tokenizer, trust_remote_code)
    key = _key(data, corpus, given)
    directory = ensure_directory(
        cache_root(data) / "tokens" / _sha256(key),
        lambda path: pretokenized.is_intact(path, cache_root(data)),
        lambda path: _build(path, data, corpus, given, key),
        tokenization.has_pieces,
    )
    if data.tokenizer is None:
        return directory, directory / "tokenizer"
    place = Path(data.tokenizer).expanduser()
    return directory, place if place.is_dir() else data.tokenizer


def _key(data: DataConfig, corpus: corpora.Corpus, given: PreTrainedTokenizerBase | None) -> dict:
    """Return what the token ids depend on."""
    if given is None:
        tokenizer_key = {"vocab_size": data.vocab_size, "training": tokenizer.TRAINING, "config": tokenizer.CONFIG}
    else:
        tokenizer_key = identity_of(given)
    return {
        "format": FORMAT_VERSION,
        "source": data.source,
        "corpus": corpus.sha256,
        "text_column": data.text_column,
        "max_tokens": data.max_tokens,
        "tokenizer": tokenizer_key,
    }


def identity_of(given: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return what tells a tokenizer from others.

    That is what it does rather than its files: the same for a directory and the hub id it came from, and a model
    directory need not have its gigabytes of weights hashed.
    """
    backend = getattr(given, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps([type(given).__name__, given.get_vocab()])
    identity = {
        "sha256": hashlib.sha256(state.encode()).hexdigest(),
        "eos_id": given.eos_token_id,
        "pad_id": given.pad_token_id,
    }
    if encoding.reads_names(given):  # entries of versions that gave control tokens for their names
        identity["names_are_text"] = True
    return identity


def _build(
    directory: Path, data: DataConfig, corpus: corpora.Corpus, given: PreTrainedTokenizerBase | None, key: dict
) -> None:
    splits = corpus.open()
    assert splits.validation is not None  # it has been held out where the corpus has none
    progress = tokenization.progress_of(directory, splits.revision)
    if given is None:
        given = _trained_tokenizer(directory / "tokenizer", data, corpus, splits.train, progress)
    dtype = tokenization.dtype_of(given)
    tokenization.write_tokens(directory, "train", splits.train, given, dtype, progress, data.max_tokens)
    tokenization.write_tokens(
        directory,
        "validation",
        splits.validation,
        given,
        dtype,
        progress,
        corpus.max_validation_tokens,
        whole_documents=True,
    )
    train, validation = progress.train, progress.validation
    if train.tokens == 0 or validation.tokens == 0:
        (directory / tokenization.PROGRESS).unlink()  # there is nothing to resume
        raise ValueError(
            f"data.source: {data.source!r} gives {train.tokens} training and {validation.tokens} "
            f"validation tokens; both need text, use a larger corpus or set data.validation"
        )
    metadata = {
        "train_tokens": train.tokens,
        "train_documents": train.documents,
        "validation_tokens": validation.tokens,
        "validation_documents": validation.documents,
        "validation_words": validation.words,
        "validation_bytes": validation.bytes,
        "dtype": dtype.name,
        "vocab_size": tokenizer.num_ids(given),
        "eos_id": given.eos_token_id,
        "pad_id": given.eos_token_id if given.pad_token_id is None else given.pad_token_id,
        "trained_tokenizer": data.tokenizer is None,
        "revision": splits.revision,
        "key": key,
    }
    pretokenized.write_metadata(directory, metadata)
    (directory / tokenization.PROGRESS).unlink()


def _trained_tokenizer(
    directory: Path, data: DataConfig, corpus: corpora.Corpus, documents: Documents, progress: tokenization.Progress
) -> PreTrainedTokenizerBase:
    before = progress.tokenizer_sha256
    if before and before == pretokenized.tokenizer_hashes(directory.parent):
        return tokenizer.load(directory)
    shutil.rmtree(directory, ignore_errors=True)
    texts = iter(documents)
    if corpus.is_streamed:
        assert data.max_tokens is not None
        texts = corpora.beginning(texts, data.max_tokens)  # no token is less than a byte, so all of that will be needed
    given = tokenizer.train(texts, data.vocab_size, directory)
    progress.tokenizer_sha256 = pretokenized.tokenizer_hashes(directory.parent)
    if before != progress.tokenizer_sha256:  # whatever is there are the ids of another one
        progress.train, progress.validation = tokenization.SplitProgress(), tokenization.SplitProgress()
    return given


def _map(directory: Path, split: str, metadata: dict) -> np.memmap:
    return np.memmap(directory / f"{split}.bin", dtype=metadata["dtype"], mode="r")


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

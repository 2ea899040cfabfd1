"""The `data.` section: one corpus, or a mixture of several."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal, get_args

from relora_ds.config.rules import MAX_TOKENS, FilePath, Integer, Number

DataSource = Literal["wikitext2", "pydocs", "gutenberg", "c4", "text", "pretokenized"]
DATA_SOURCES: tuple[str, ...] = get_args(DataSource)
MAX_VOCABULARY = 10**7
# What each corpus of a mixture has for itself.
OF_A_CORPUS = ("source", "path", "config", "split", "text_column", "validation", "max_tokens")


@dataclass(kw_only=True)
class MixSource:
    """One corpus of a mixture. The keys it shares with `data.` mean the same."""

    weight: Annotated[float, Number("above 0", example=0.5)] = 1.0
    """Its share of the training rows; the weights of a mixture sum to 1. Rows have `data.seq_len` tokens each, so it is
    also the share of the tokens; with `data.packing=false`, that of the documents."""
    name: str | None = None
    """What metrics call it; null = the name of its path or source, without directory and suffix."""
    source: Annotated[DataSource | str, FilePath()] = "text"
    """The corpus, as `data.source`."""
    path: Annotated[str | None, FilePath()] = None
    """As `data.path`."""
    config: str | None = None
    """As `data.config`."""
    split: str = "train"
    """As `data.split`."""
    text_column: str = "text"
    """As `data.text_column`."""
    validation: Annotated[str | float | None, Number("inside (0, 1)", example=0.05), FilePath()] = None
    """As `data.validation`."""
    max_tokens: Annotated[int | None, Integer(1, most=MAX_TOKENS, example=1_000_000)] = None
    """As `data.max_tokens`."""

    @property
    def label(self) -> str:
        """The name, or what stands for it."""
        return self.name or _stem(self.path or self.source)


@dataclass(kw_only=True)
class ValidationSet:
    """More text to evaluate on."""

    path: Annotated[str, FilePath()] = ""
    """A file, directory or glob, as `data.path` of `text`; all of it is validation text."""
    name: str | None = None
    """What metrics call it; null = the name of its path, without directory and suffix."""
    text_column: str = "text"
    """Column of JSON lines and parquet that holds the text."""

    @property
    def label(self) -> str:
        """The name, or what stands for it."""
        return self.name or _stem(self.path)


@dataclass(kw_only=True)
class DataConfig:
    """Corpus and tokenizer."""

    mix: list[MixSource] | None = None
    """Several corpora, each with the share of the training rows that its `weight` says. `source`, `path`, `config`,
    `split`, `text_column`, `validation` and `max_tokens` then stand in its items, and none of them here."""
    source: Annotated[DataSource | str, FilePath()] = "wikitext2"
    """The corpus. `wikitext2`, `pydocs` and `gutenberg` need nothing else; `c4` is streamed until `max_tokens`, from
    the hub or from shards in the directory `path`; `text` reads `path`; `pretokenized` trains from the directory `path`
    that `relora prepare` wrote, with the tokenizer inside. Anything with a slash is what `datasets.load_dataset` takes:
    streamed with `max_tokens`, loaded without."""
    path: Annotated[str | None, FilePath()] = None
    """For `text`: a file, directory or glob of text (one document per file), JSON lines or parquet (one per record).
    For `c4` and `pretokenized`: a directory."""
    config: str | None = None
    """Configuration of the dataset on the hub."""
    split: str = "train"
    """Split of the dataset on the hub."""
    text_column: str = "text"
    """Column of JSON lines, parquet and datasets that holds the text."""
    validation: Annotated[str | float | None, Number("inside (0, 1)", example=0.05), FilePath()] = None
    """A path, or the fraction of the documents to hold out; null = the corpus' own validation split, else 0.05. Of a
    stream it is bounded too, by a twentieth of `max_tokens` and 10 M tokens."""
    validation_sets: list[ValidationSet] | None = None
    """More validation texts, each with a loss of its own in the metrics, `val_loss/NAME`. `val_loss` is that of
    `validation`; of a mixture it is that of all its corpora, which have their own beside it too."""
    max_tokens: Annotated[int | None, Integer(1, most=MAX_TOKENS, example=1_000_000)] = None
    """Training tokens after which no more of the corpus is read; null = all of it."""
    deduplicate: Annotated[float | None, Number("inside (0, 1)", example=0.8)] = None
    """Leave out training documents that resemble a validation document or an earlier one: the Jaccard similarity of
    their 5-grams of words, estimated by MinHash, from which on they are copies. null = all documents are read."""
    tokenizer: Annotated[str | None, FilePath()] = None
    """A tokenizer of the hub or a directory; null = train a sentencepiece BPE on the corpus."""
    vocab_size: Annotated[int, Integer(1, most=MAX_VOCABULARY)] = 8192
    """Pieces of the tokenizer that is trained on the corpus."""
    seq_len: Annotated[int, Integer(1)] = 256
    """Tokens of a training sequence."""
    packing: bool | Literal["masked"] = True
    """true = rows are windows of the whole corpus. masked = windows in which attention and positions stop at the ends
    of documents: each document is trained on as if it were alone, and its first token is not predicted. What is cut off
    at a window's end begins anew in the next one. false = one document per row, cut or padded to `seq_len`."""
    cache_dir: Annotated[str | None, FilePath()] = None
    """Where tokenized corpora are kept; null = the user's cache directory."""

    @property
    def masks_documents(self) -> bool:
        """Whether there are several documents in a row, and kept apart."""
        return self.packing == "masked"

    @property
    def label(self) -> str:
        """What the corpus is called in a line for people."""
        return self.source if self.mix is None else " + ".join(f"{one.weight:g} {one.label}" for one in self.mix)

    def parts(self) -> list["DataConfig"]:
        """Return a section for each corpus: of a mixture its items, else this one alone."""
        if self.mix is None:
            return [self]
        return [
            dataclasses.replace(self, mix=None, **{name: getattr(one, name) for name in OF_A_CORPUS})
            for one in self.mix
        ]


def of_each_corpus(data: DataConfig, find: Callable[[DataConfig], Iterable[str]]) -> Iterator[str]:
    """Yield the messages of `find` about each of `DataConfig.parts`, with the keys as the recipe has them."""
    for index, part in enumerate(data.parts()):
        yield from (message if data.mix is None else of_part(message, index) for message in find(part))


def _stem(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(path).name.split(".")[0])


def of_part(message: str, index: int, field: str = "mix") -> str:
    """Return a message about `DataConfig.parts()[index]` of a mixture, with the keys as the recipe has them.

    field: the list that the item is in: mix or validation_sets.
    """
    return re.sub(rf"\bdata\.({'|'.join(OF_A_CORPUS)})\b", rf"data.{field}[{index}].\1", message)

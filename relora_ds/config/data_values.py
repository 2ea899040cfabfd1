"""What makes the values of the `data.` section wrong beside what each field takes, and which have no effect."""

import dataclasses
import math
import re
from collections.abc import Iterator

from relora_ds.config import fields, records
from relora_ds.config.data_config import DATA_SOURCES, OF_A_CORPUS, DataConfig, MixSource, of_each_corpus
from relora_ds.config.rules import nearest

LEAST_VOCABULARY = 261  # 256 bytes, 4 special tokens, and a piece
WEIGHTS_TOLERANCE = 1e-6
_READS_PATH = ("text", "c4", "pretokenized")
_WITHOUT_FILES = ("wikitext2", "pydocs", "gutenberg")


def problems(data: DataConfig) -> list[str]:
    """Return what is wrong with the values of the section on its own."""
    found = [*fields.problems(data, "data."), *records.problems(data, "data.")]
    return found + list(conflicts(data, {message.partition(":")[0] for message in found}))


def conflicts(data: DataConfig, wrong: set[str]) -> Iterator[str]:
    """Yield what is wrong with values that their own fields take. wrong: keys with which something is wrong already."""
    if not any(key.startswith("data.mix") for key in wrong):
        yield from _weight_conflicts(data.mix)
        yield from of_each_corpus(data, lambda part: _corpus_conflicts(part, wrong))
    yield from _name_conflicts(data)
    trains_tokenizer = data.tokenizer is None and all(part.source != "pretokenized" for part in data.parts())
    # Whether the corpus' characters fit too is known after reading it.
    if trains_tokenizer and "data.vocab_size" not in wrong and data.vocab_size < LEAST_VOCABULARY:
        yield (
            f"data.vocab_size: {data.vocab_size} is not above {LEAST_VOCABULARY - 1} (256 bytes and 4 special "
            "tokens); use e.g. 8192"
        )
    if "data.seq_len" not in wrong and data.seq_len == 1:
        yield "data.seq_len: 1 leaves no next token to predict; use e.g. 256"


def source_problem(source: str) -> str | None:
    """Return what is wrong with a `data.source`, as far as its name tells."""
    if source in DATA_SOURCES or "/" in str(source):
        return None
    files = "; JSON lines and parquet are read by data.source=text" if source in ("json", "jsonl", "parquet") else ""
    return (
        f"data.source: {source!r} is unknown{nearest(source, DATA_SOURCES)}; use one of {', '.join(DATA_SOURCES)}, "
        f"or org/name of the Hugging Face hub{files}"
    )


def _weight_conflicts(mix: list[MixSource] | None) -> Iterator[str]:
    """Yield what is wrong between the corpora of a mixture."""
    if mix is None:
        return
    if not mix:
        yield "data.mix: [] names no corpus; use e.g. [{source: wikitext2, weight: 1}], or null"
    elif abs((total := math.fsum(one.weight for one in mix)) - 1) > WEIGHTS_TOLERANCE:
        weights = " + ".join(f"{one.weight:g}" for one in mix)
        yield f"data.mix: the weights {weights} sum to {total:g}, not to 1; change them"


def _name_conflicts(data: DataConfig) -> Iterator[str]:
    """Yield what is wrong with the names that metrics have for corpora of a mixture and for validation sets."""
    seen: dict[str, str] = {}
    for field in ("mix", "validation_sets"):
        for index, one in enumerate(getattr(data, field) or ()):
            key, label = f"data.{field}[{index}]", one.label
            if not re.fullmatch(r"[A-Za-z0-9_-]+", label):
                yield f"{key}.name: {label!r} is not made of letters, digits, - and _; change it"
            elif label in seen:
                yield f"{key}.name: {label} is that of {seen[label]} too; set another one"
            seen.setdefault(label, key)


def _corpus_conflicts(data: DataConfig, wrong: set[str]) -> Iterator[str]:
    """Yield what is wrong with one corpus."""
    if found := source_problem(data.source):
        yield found
    else:
        yield from _source_conflicts(data)
        if data.deduplicate is not None and (data.source == "c4" or ("/" in data.source and data.max_tokens)):
            yield (
                f"data.deduplicate: {data.deduplicate} needs all documents at once, and data.source {data.source} is "
                "streamed; use null, or files with data.source=text"
            )
        if wrong & {"data.seq_len", "data.max_tokens"} or data.seq_len == 1 or data.max_tokens is None:
            return
        if data.max_tokens < data.seq_len:
            yield (
                f"data.max_tokens: {data.max_tokens} does not hold one sequence of data.seq_len {data.seq_len}; raise "
                "it, or use null"
            )


def _source_conflicts(data: DataConfig) -> Iterator[str]:
    """Yield what the source makes of path, text_column and max_tokens."""
    if data.source in ("text", "pretokenized") and not data.path:
        what = "a file, a directory or a glob" if data.source == "text" else "what python -m relora_ds prepare wrote"
        yield f"data.path: null, and data.source {data.source} reads it; set it to {what}"
    elif data.path and data.source not in _READS_PATH:
        yield (
            f"data.path: {data.path} is not read with data.source {data.source}; use data.source=text, or remove "
            "data.path"
        )
    if data.source == "c4" and data.max_tokens is None:
        yield (
            "data.max_tokens: null, and c4 (hundreds of gigabytes) is streamed until so many tokens are there; set "
            "it, e.g. data.max_tokens=1_000_000_000"
        )
    if data.source in _WITHOUT_FILES and data.text_column != "text":
        yield f"data.text_column: {data.text_column} has no effect with data.source {data.source}; remove it"


def warnings(data: DataConfig) -> Iterator[str]:
    """Yield what is allowed but has no effect."""
    if data.mix is not None:
        for name in OF_A_CORPUS:
            if name != "source" and (value := getattr(data, name)) != getattr(DataConfig, name):
                yield f"data.{name}: {value} has no effect with data.mix; set {name} in its items"
        yield from of_each_corpus(dataclasses.replace(data, tokenizer=None), warnings)  # the others may read it
        return
    ignored = []
    if data.source != "c4" and "/" not in data.source:
        ignored += ["config", "split"]
    if data.source == "pretokenized":
        ignored += ["text_column", "validation", "tokenizer", "deduplicate"]
    for name in ignored:
        if (value := getattr(data, name)) != getattr(type(data), name):
            yield f"data.{name}: {value} has no effect with data.source {data.source}"

"""Corpora through the `datasets` library: ids of the Hugging Face hub, local paths that it takes, and C4.

A corpus is loaded, which downloads all of it, or streamed, which downloads what is read. Each shard of a stream is
opened when the one before it has been read to its end, so that a reading that stops early opens no shard too many.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relora_ds.data.localfiles import first_line, no_column, text_of, without
from relora_ds.data.reading import Documents

if TYPE_CHECKING:
    import datasets

TIMEOUT_SECONDS = 3.0
ROWS_PER_SHARD = 10_000  # of a corpus that was loaded: what is read again when an interrupted reading resumes

C4_NAME, C4_CONFIG = "allenai/c4", "en"
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")


class Splits(NamedTuple):
    """revision: the commit on the hub, or what `datasets` says instead. validation: None = the corpus has none."""

    train: Documents
    validation: Documents | None
    revision: str


def is_offline() -> bool:
    """Return whether the user said so (HF_HUB_OFFLINE=1): then the Hugging Face cache is all there is."""
    import huggingface_hub.constants

    return huggingface_hub.constants.HF_HUB_OFFLINE


def why_unreachable(name: str, repo_type: str = "dataset") -> str:
    """Return "" if the hub answers about `name` within seconds, else the reason in one line.

    Asked first because `datasets` and `transformers` retry for half a minute and more. A thread bounds the name
    resolution too.
    """
    from huggingface_hub import HfApi

    answer: list[str] = []

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=repo_type, timeout=TIMEOUT_SECONDS)
            answer.append("")
        except Exception as error:
            answer.append(f"{type(error).__name__}: {first_line(error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS + 1)
    return answer[0] if answer else f"no answer within {TIMEOUT_SECONDS + 1:.0f} s"


def is_local(name: str) -> bool:
    """Return whether a corpus' name is a path on this machine."""
    return Path(name).expanduser().exists()


def c4_shards(directory: str, config: str, split: str, held_out: Sequence[Path] = ()) -> dict[str, list[Path]]:
    """{"train": shards of `split`, "validation": shards} under `directory`, which is laid out like allenai/c4.

    Without "validation" where there are none, or where `split` trains on them: as with any corpus, part of that is held
    out then.

    The shards `c4-<split>.00000-of-01024.json.gz` lie in it or in the subfolder of the configuration. Only their names
    are looked at. Shards that are `held_out` are not trained on. Raises ValueError when there are no training shards.
    """
    root = Path(directory).expanduser()
    for folder in (root, root / config):
        train, validation = (sorted(folder.glob(f"c4-{of}.*.json.gz")) for of in (split, "validation"))
        train = without(train, held_out)
        if train:
            return {"train": train} | ({"validation": validation} if validation and split != "validation" else {})
    raise ValueError(
        f"data.path: {directory!r} holds no shard c4-{split}.*.json.gz, nor does its folder {config}; "
        f"copy shards of {C4_NAME} there, or remove data.path to stream them from the hub"
    )


def open_splits(
    name: str,
    config: str | None,
    split: str,
    text_column: str,
    *,
    streaming: bool,
    files: dict[str, list[Path]] | None = None,
    held_out: Sequence[Path] = (),
) -> Splits:
    """Return the documents of a corpus and of its own validation split.

    files: {split: files} to read instead of those of the hub. held_out: files of validation text. Raises ValueError:
    not reachable, no such corpus, configuration, split or column; a corpus on this machine that trains on a held-out
    file.
    """
    import datasets

    if files is None and not is_local(name) and not is_offline() and (reason := why_unreachable(name)):
        raise ValueError(_unreachable_message(name, reason, streaming))
    try:
        if files is None:
            builder = datasets.load_dataset_builder(str(Path(name).expanduser()) if is_local(name) else name, config)
        else:
            builder = datasets.load_dataset_builder("json", data_files={k: list(map(str, v)) for k, v in files.items()})
        _require_held_out(builder, name, split, held_out)
        if not streaming:
            builder.download_and_prepare()
        found = builder.as_streaming_dataset() if streaming else builder.as_dataset()
        found = {str(own): part for own, part in found.items()}
    except HeldOutError:
        raise
    except Exception as error:  # the library's errors for a missing configuration, a lost connection, …: many classes
        raise ValueError(_opening_message(name, config, error, streaming)) from error
    train = split if files is None else "train"
    if train not in found:
        raise ValueError(f"data.split: {split!r} is not in {name!r}; it has: {', '.join(found)}")
    own = next((own for own in VALIDATION_SPLITS if own in found and own != train), None)
    return Splits(
        _documents(found[train], name, text_column, files["train"] if files else None),
        _documents(found[own], name, text_column, files["validation"] if files else None) if own else None,
        str(builder.hash),
    )


class HeldOutError(ValueError):
    """The corpus trains on its validation text."""


def _require_held_out(builder: datasets.DatasetBuilder, name: str, split: str, held_out: Sequence[Path]) -> None:
    if not held_out or not is_local(name):
        return
    read = [Path(file) for file in (builder.config.data_files or {}).get(split, ()) if Path(file).is_file()]
    if both := [file for file in read if file not in without(read, held_out)]:
        raise HeldOutError(
            f"data.validation: {str(both[0])!r} is also training text of data.source {name!r}; move it "
            f"elsewhere, or use data.source=text with data.path={name}, which leaves it out"
        )


def _unreachable_message(name: str, reason: str, streaming: bool) -> str:
    """One line: what cannot be reached, and how to do without."""
    cached = "" if streaming else "HF_HUB_OFFLINE=1 where the Hugging Face cache holds it, or "
    shards = "local shards in data.path, or " if name == C4_NAME else ""
    return (
        f"data.source: {name!r} cannot be read from the Hugging Face hub ({reason}); check the name, or work "
        f"offline: {cached}{shards}`python -m relora_ds prepare` on a machine with a connection and "
        f"data.source=pretokenized here"
    )


def _opening_message(name: str, config: str | None, error: Exception, streaming: bool) -> str:
    text = " ".join(str(error.__cause__ or error).split())[:400]
    if "Config name is missing" in text or "BuilderConfig" in text:
        return f"data.config: {config!r} does not name a configuration of {name!r}: {text}"
    if isinstance(error, ConnectionError) or "offline" in text.lower():
        return _unreachable_message(name, text, streaming)
    return f"data.source: {name!r} cannot be opened ({type(error).__name__}: {text})"


def _documents(
    split: datasets.Dataset | datasets.IterableDataset, name: str, text_column: str, files: list[Path] | None
) -> Documents:
    import datasets

    if split.column_names is not None and text_column not in split.column_names:
        raise ValueError(no_column(text_column, repr(name), split.column_names))
    if isinstance(split, datasets.IterableDataset):
        num_shards = split.num_shards
        assert files is None or len(files) == num_shards, "a shard is a file"
        where = list(map(str, files or (f"{name}, shard {index} of {num_shards}" for index in range(num_shards))))
        # The size and the mtime of local files are in the key of the cache entry (corpora.py).
        remedy = (
            "copy the file again and run again: as its time and size change, tokenizing starts from the beginning"
            if files or is_local(name)
            else "repair it, or the connection, and run again: the tokenized pieces are kept"
        )
        shards = [
            partial(_stream, split, num_shards, index, where[index], text_column, remedy) for index in range(num_shards)
        ]
    else:
        shards = [partial(_rows, split, start, name, text_column) for start in range(0, len(split), ROWS_PER_SHARD)]
    return Documents(shards)


def _stream(
    split: datasets.IterableDataset, num_shards: int, index: int, where: str, text_column: str, remedy: str
) -> Iterator[str]:
    rows = iter(split.shard(num_shards, index))
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # a lost connection, a damaged file: pyarrow's, zlib's, fsspec's, … errors
            raise ValueError(
                f"data.source: {where} cannot be read ({type(error).__name__}: {first_line(error)}); {remedy}"
            ) from error
        if text_column not in row:
            raise ValueError(no_column(text_column, where, row))
        text = text_of(row[text_column], text_column, where)
        if text.strip():
            yield text


def _rows(split: datasets.Dataset, start: int, name: str, text_column: str) -> Iterator[str]:
    part = split.select_columns([text_column]).select(range(start, min(start + ROWS_PER_SHARD, len(split))))
    try:
        yield from _texts(part, name, text_column)
    except UnicodeDecodeError:
        row = next(row for row in range(len(part)) if not _is_readable(part, row))
        raise ValueError(
            f"data.source: {name!r} is not UTF-8 (column {text_column}, row {start + row}); write it "
            f"again with its text in UTF-8, or without the row"
        ) from None


def _is_readable(part: datasets.Dataset, row: int) -> bool:
    try:
        part[row]
    except UnicodeDecodeError:
        return False
    return True


def _texts(part: datasets.Dataset, name: str, text_column: str) -> Iterator[str]:
    for batch in part.iter(batch_size=1000):
        for value in batch[text_column]:
            text = text_of(value, text_column, repr(name))
            if text.strip():
                yield text

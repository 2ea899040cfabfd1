"""More texts to evaluate on (`data.validation_sets`) as memory-mapped token ids, made once per host."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relora_ds.config.data_config import of_part
from relora_ds.data import file_hashes, localfiles, tokenization
from relora_ds.data.cache import cache_root, ensure_directory
from relora_ds.data.preparation import FORMAT_VERSION, NamedTokens, identity_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from relora_ds.config import DataConfig


def prepare_sets(data: DataConfig, given: PreTrainedTokenizerBase) -> tuple[NamedTokens, ...]:
    """Tokenize the validation sets of the `data.` section, or find them in the cache.

    Raises ValueError for files that cannot be read, and for a set without text.
    """
    found = []
    for index, (one, files) in enumerate(zip(data.validation_sets or (), files_of_sets(data), strict=True)):
        with _named(index):
            tokens = _tokens(files, one.text_column, data, given)
            if not len(tokens):
                raise ValueError(f"data.path: {one.path!r} holds no text; name another file, or remove the set")
        found.append(NamedTokens(one.label, tokens))
    return tuple(found)


def files_of_sets(data: DataConfig) -> list[list[Path]]:
    """Return the files of each validation set, after a look at their first records. Raises as `prepare_sets` does."""
    found = []
    for index, one in enumerate(data.validation_sets or ()):
        with _named(index):
            found.append(localfiles.find(one.path, "data.path"))
            localfiles.check(found[-1], one.text_column)
    return found


@contextlib.contextmanager
def _named(index: int) -> Iterator[None]:
    """Have a ValueError name the keys of a validation set."""
    try:
        yield
    except ValueError as error:
        raise ValueError(of_part(str(error), index, "validation_sets")) from error


def _tokens(files: list[Path], text_column: str, data: DataConfig, given: PreTrainedTokenizerBase) -> np.ndarray:
    contents = list(zip(map(localfiles.kind, files), file_hashes.sha256_of(files, cache_root(data)), strict=True))
    key = json.dumps([FORMAT_VERSION, identity_of(given), contents, text_column], sort_keys=True)
    dtype = tokenization.dtype_of(given)

    def build(directory: Path) -> None:
        documents = localfiles.documents_of(files, text_column)
        progress = tokenization.progress_of(directory, "")
        tokenization.write_tokens(directory, "validation", documents, given, dtype, progress)

    directory = ensure_directory(
        cache_root(data) / "validation" / hashlib.sha256(key.encode()).hexdigest(),
        lambda path: _is_complete(path, dtype.itemsize),
        build,
        tokenization.has_pieces,
    )
    file = directory / "validation.bin"
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)


def _is_complete(directory: Path, itemsize: int) -> bool:
    state = tokenization.progress_of(directory, "").validation
    file = directory / "validation.bin"
    return state.is_done and file.is_file() and file.stat().st_size == state.tokens * itemsize

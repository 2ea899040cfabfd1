"""More texts to evaluate on (`data.validation_sets`) as memory-mapped token ids, made once per host."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
    for index, one in enumerate(data.validation_sets or ()):
        field = f"data.validation_sets[{index}].path"
        files = localfiles.find(one.path, field)
        tokens = _tokens(files, one.text_column, data, given)
        if not len(tokens):
            raise ValueError(f"{field}: {one.path!r} holds no text; name another file, or remove the set")
        found.append(NamedTokens(one.label, tokens))
    return tuple(found)


def _tokens(files: list[Path], text_column: str, data: DataConfig, given: PreTrainedTokenizerBase) -> np.ndarray:
    localfiles.check(files, text_column)
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

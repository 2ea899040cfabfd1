"""Check the `data.` section and what it names on disk, without a download and without reading a corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ds.config import data_values, paths
from relora_ds.config.data_config import of_each_corpus
from relora_ds.data import corpora, deduplication, hub, localfiles, pretokenized
from relora_ds.data.cache import cache_root

if TYPE_CHECKING:
    from relora_ds.config import DataConfig


def problems(data: DataConfig) -> list[str]:
    """Return what is wrong with the section, one message each; its files are looked at once its values are in order."""
    if found := [*data_values.problems(data), *paths.missing_data(data)]:
        return found
    found += of_each_corpus(data, _file_problems)
    for index, one in enumerate(data.validation_sets or ()):
        found += _error_of(localfiles.find, one.path, f"data.validation_sets[{index}].path")
    if any(part.source != "pretokenized" for part in data.parts()):
        found += _tokenizer_problems(data)
    if data.deduplicate is not None and (reason := deduplication.missing_package()):
        found.append(f"data.deduplicate: {data.deduplicate} {reason}")
    if cache_root(data).exists() and not cache_root(data).is_dir():
        found.append(f"data.cache_dir: {str(cache_root(data))!r} is not a directory; name one")
    return list(dict.fromkeys(found))


def _file_problems(data: DataConfig) -> list[str]:
    """Return what is wrong with the files of one corpus."""
    found: list[str] = []
    if data.source == "text":
        found += _error_of(corpora.text_files, data)
    elif data.source == "pretokenized":
        found += _error_of(pretokenized.read_metadata, data.path)
    elif data.source == "c4" and data.path:
        found += _error_of(hub.c4_shards, data.path, data.config or hub.C4_CONFIG, data.split)
    if data.source != "pretokenized":
        found += _validation_problems(data)
    return found


def _validation_problems(data: DataConfig) -> list[str]:
    try:
        validation = corpora.validation_setting(data)
    except ValueError as error:
        return [str(error)]
    return _error_of(localfiles.find, validation, "data.validation") if isinstance(validation, str) else []


def _tokenizer_problems(data: DataConfig) -> list[str]:
    if data.tokenizer is None or not Path(data.tokenizer).expanduser().is_file():
        return []
    return [f"data.tokenizer: {data.tokenizer!r} is not a directory; give a tokenizer's directory or a Hugging Face id"]


def _error_of(function: Callable, *arguments: object) -> list[str]:
    """Return the message of the ValueError that a call raises; [] without one."""
    try:
        function(*arguments)
    except ValueError as error:
        return [str(error)]
    return []

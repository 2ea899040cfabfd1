"""Validation text that is training text too, by other keys of the `data.` section.

What `data.validation` of a corpus names is left out of that corpus' own files (`corpora`). A validation set, or what
another corpus of a mixture holds out, is not: a run may want the loss on what it trains on, but must be told.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ds.data import corpora, file_hashes, localfiles
from relora_ds.data.cache import cache_root
from relora_ds.data.reading import DataWarning
from relora_ds.data.validation_sets import files_of_sets

if TYPE_CHECKING:
    from relora_ds.config import DataConfig

Contents = dict[str, Path]  # files by their sha256
_MOST_NAMED = 8


def warn_of_trained(data: DataConfig) -> None:
    """Warn of files of validation text that the run also trains on. Only those of source `text` are compared."""
    if data.mix is None and not data.validation_sets:
        return
    parts = data.parts()
    trained = [_contents(corpora.text_files(part), data) if part.source == "text" else {} for part in parts]
    for key, held_out, also_in in _held_out(data, trained):
        files = {sha256: file for index in also_in for sha256, file in trained[index].items() if sha256 in held_out}
        if files:
            named = ", ".join(map(str, list(files.values())[:_MOST_NAMED]))
            more = f" and {len(files) - _MOST_NAMED} more" if len(files) > _MOST_NAMED else ""
            warnings.warn(
                f"{key}: the run also trains on {named}{more}; its loss is not that of unseen text, name other files",
                DataWarning,
                stacklevel=3,
            )


def _held_out(data: DataConfig, trained: list[Contents]) -> Iterator[tuple[str, Contents, list[int]]]:
    """Yield (the key of some validation text, its files, the corpora that must not have them)."""
    for index, files in enumerate(files_of_sets(data)):
        yield f"data.validation_sets[{index}].path", _contents(files, data), list(range(len(trained)))
    if data.mix is None:
        return
    settings = [corpora.validation_setting(part) for part in data.parts()]
    for index, validation in enumerate(settings):
        others = [other for other in range(len(trained)) if other != index]
        if isinstance(validation, str):
            files = localfiles.find(validation, f"data.mix[{index}].validation")
            yield f"data.mix[{index}].validation", _contents(files, data), others
        else:  # of the same files the same documents are held out
            same = (validation, trained[index].keys())
            others = [other for other in others if (settings[other], trained[other].keys()) != same]
            yield f"data.mix[{index}].path, part of which is held out", trained[index], others


def _contents(files: list[Path], data: DataConfig) -> Contents:
    return dict(zip(file_hashes.sha256_of(files, cache_root(data)), files, strict=True))

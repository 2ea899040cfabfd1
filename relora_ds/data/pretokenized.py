"""Tokens in a directory that stands on its own: train.bin, validation.bin, tokenizer/, metadata.json.

`python -m relora_ds prepare` writes one from the cache; it can be copied to another machine, and `data.source`
pretokenized trains from it. A cache entry has the same files, except for a tokenizer that the recipe names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relora_ds.data import manifest
from relora_ds.data.cache import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation")
METADATA = "metadata.json"


def write(source: Path, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Copy the tokens in `source`, a cache entry, to `directory`, and `tokenizer` with them.

    `directory` is complete or absent afterwards. Raises ValueError when it exists and is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; name a new directory")

    partial = directory.absolute().with_name(f".{directory.absolute().name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for split in SPLITS:
            shutil.copyfile(source / f"{split}.bin", partial / f"{split}.bin")
        if (source / "tokenizer").is_dir():
            shutil.copytree(source / "tokenizer", partial / "tokenizer")
        else:
            tokenizer.save_pretrained(partial / "tokenizer")
        shutil.copyfile(source / METADATA, partial / METADATA)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_metadata(directory: Path, metadata: dict) -> None:
    """Write metadata.json for the tokens in `directory`: `metadata`, the files' hashes and the fingerprint."""
    hashes = {split: manifest.sha256_of_file(directory / f"{split}.bin") for split in SPLITS}
    metadata = {**metadata, "sha256": hashes, "fingerprint": _fingerprint(metadata, hashes.values())}
    write_atomically(directory / METADATA, json.dumps(metadata, indent=2) + "\n")


def is_complete(directory: Path) -> bool:
    """Whether the metadata, which is written last, is there, and the sizes that it states."""
    try:
        return _size_problem(directory, _read(directory)) is None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_metadata(path: str | Path | None) -> dict:
    """metadata.json of a directory. ValueError: not a directory of tokens, or one that was cut short."""
    if not path:
        raise ValueError("data.path: missing; data.source=pretokenized needs a directory that `python -m relora_ds "
                         "prepare` wrote")
    directory = Path(path).expanduser()
    try:
        metadata = _read(directory)
        problem = _size_problem(directory, metadata)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"data.path: {str(path)!r} holds no tokens; name a directory that `python -m relora_ds "
                         f"prepare` wrote, all of it") from None
    if problem:
        raise ValueError(f"data.path: {problem}; copy the directory again")
    return metadata


def verified_metadata(path: str | Path, cache_root: Path) -> dict:
    """`read_metadata` after comparing the contents with their hashes; the first time only, see manifest.py."""
    metadata = read_metadata(path)
    directory = Path(path).expanduser()
    found = manifest.sha256_of([directory / f"{split}.bin" for split in SPLITS], cache_root)
    for split, sha256 in zip(SPLITS, found, strict=True):
        if sha256 != metadata["sha256"][split]:
            raise ValueError(f"data.path: {str(directory / split)}.bin is damaged (sha256 {sha256[:12]}…, written as "
                             f"{metadata['sha256'][split][:12]}…); copy the directory again")
    if not (directory / "tokenizer").is_dir():
        raise ValueError(f"data.path: {str(path)!r} holds no tokenizer; copy the directory again, all of it")
    return metadata


def _read(directory: Path) -> dict:
    return json.loads((directory / METADATA).read_text(encoding="utf-8"))


def _size_problem(directory: Path, metadata: dict) -> str | None:
    itemsize = np.dtype(metadata["dtype"]).itemsize
    for split in SPLITS:
        file, expected = directory / f"{split}.bin", metadata[f"{split}_tokens"] * itemsize
        if not file.is_file() or file.stat().st_size != expected:
            size = file.stat().st_size if file.is_file() else "no"
            return f"{str(file)!r} has {size} bytes of {expected}"
    if metadata["trained_tokenizer"] and not (directory / "tokenizer" / "tokenizer.model").is_file():
        return f"{str(directory / 'tokenizer' / 'tokenizer.model')!r} is missing"
    return None if metadata["fingerprint"] else "the fingerprint is missing"


def _fingerprint(metadata: dict, hashes: Iterable[str]) -> str:
    what = [metadata["dtype"], metadata["vocab_size"], metadata["eos_id"], *hashes]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


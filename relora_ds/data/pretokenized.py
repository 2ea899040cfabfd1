"""Tokens in a directory that stands on its own: train.bin, validation.bin, tokenizer/, metadata.json.

`python -m relora_ds prepare` writes one from the cache; it can be copied to another machine, and `data.source`
pretokenized trains from it. A cache entry has the same files, except for a tokenizer that the recipe names.

metadata.json holds the sha256 of every other file and a checksum of itself. All of it is verified before it is used;
what was verified is remembered while the files stay as they are (manifest.py). Directories of versions before that have
no checksum and no hashes of tokenizer files: of those, the tokens are verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relora_ds.data import file_hashes, tokenizer_files
from relora_ds.data.reading import DataWarning
from relora_ds.utils.files import sha256, write_text

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
            tokenizer_files.save(tokenizer, partial / "tokenizer")
        metadata = _read(source)
        write_metadata(partial, metadata)
        if _read(partial)["fingerprint"] != metadata["fingerprint"]:
            raise ValueError(
                f"{directory} cannot be written: the tokens in {source} changed while they were copied; run it again"
            )
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_metadata(directory: Path, metadata: dict) -> None:
    """Write metadata.json for the tokens in `directory`: `metadata`, the files' hashes, fingerprint and checksum."""
    hashes = {split: sha256(directory / f"{split}.bin") for split in SPLITS}
    metadata = {
        **metadata,
        "sha256": hashes,
        "tokenizer_sha256": tokenizer_hashes(directory),
        "fingerprint": _fingerprint(metadata, hashes),
    }
    metadata["checksum"] = checksum(metadata)
    write_text(directory / METADATA, json.dumps(metadata, indent=2) + "\n")


def tokenizer_hashes(directory: Path) -> dict[str, str]:
    """{name below `directory`: sha256} of the files of its tokenizer."""
    return {
        str(file.relative_to(directory)): sha256(file)
        for file in sorted((directory / "tokenizer").rglob("*"))
        if file.is_file()
    }


def is_intact(directory: Path, cache_root: Path) -> bool:
    """Return whether a cache entry is there and every file is as it was written. Warns of one that is damaged.

    Raises ValueError for a file that cannot be read now, which is no reason to make it again.
    """
    try:
        metadata = _read(directory)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    except OSError as error:
        raise ValueError(_unreadable("data.cache_dir", directory / METADATA, error)) from None
    except ValueError:
        problem: str | None = f"{str(directory / METADATA)!r} is damaged"
    else:
        problem = _damage(directory, metadata, cache_root, "data.cache_dir")
    if problem:
        warnings.warn(f"data.cache_dir: {problem}; the corpus is tokenized again", DataWarning, stacklevel=2)
    return problem is None


def read_metadata(path: str | Path | None) -> dict:
    """metadata.json of a directory. ValueError: not a directory of tokens, or one that was cut short."""
    if not path:
        raise ValueError(
            "data.path: missing; data.source=pretokenized needs a directory that `python -m relora_ds prepare` wrote"
        )
    directory = Path(path).expanduser()
    try:
        metadata = _read(directory)
        problem = _size_problem(directory, metadata)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"data.path: {str(path)!r} holds no tokens; name a directory that `python -m relora_ds "
            f"prepare` wrote, all of it"
        ) from None
    if problem:
        raise ValueError(f"data.path: {problem}; copy the directory again")
    return metadata


def verified_metadata(path: str | Path, cache_root: Path) -> dict:
    """`read_metadata` after comparing the contents of all files with their hashes; ValueError names a damaged one."""
    metadata = read_metadata(path)
    directory = Path(path).expanduser()
    if problem := _damage(directory, metadata, cache_root, "data.path"):
        raise ValueError(f"data.path: {problem}; copy the directory again")
    if not (directory / "tokenizer").is_dir():
        raise ValueError(f"data.path: {str(path)!r} holds no tokenizer; copy the directory again, all of it")
    return metadata


def _damage(directory: Path, metadata: dict, cache_root: Path, field: str) -> str | None:
    """Return what is not as it was written, or None. ValueError, with `field`, for a file that cannot be read."""
    try:
        if problem := _size_problem(directory, metadata):
            return problem
        expected = {f"{split}.bin": metadata["sha256"][split] for split in SPLITS}
        expected |= metadata.get("tokenizer_sha256", {})
        if metadata["fingerprint"] != _fingerprint(metadata, metadata["sha256"]):
            return f"{str(directory / METADATA)!r} is damaged (its fingerprint is of other tokens)"
        if metadata.get("checksum", computed := checksum(metadata)) != computed:
            return f"{str(directory / METADATA)!r} is damaged (its checksum differs)"
    except (KeyError, TypeError, AttributeError, ValueError):
        return f"{str(directory / METADATA)!r} is damaged"
    files = [directory / name for name in expected]
    try:
        found = file_hashes.sha256_of(files, cache_root)
        if found != list(expected.values()):  # what is remembered may be damaged too
            found = file_hashes.sha256_of(files, cache_root, afresh=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        return f"{error.filename!r} is missing"
    except OSError as error:
        raise ValueError(_unreadable(field, error.filename or directory, error)) from None
    for file, digest, written in zip(files, found, expected.values(), strict=True):
        if digest != written:
            return f"{file} is damaged (sha256 {digest[:12]}…, written as {written[:12]}…)"
    return None


def _unreadable(field: str, file: str | Path, error: OSError) -> str:
    return f"{field}: {str(file)!r} cannot be read ({error.strerror}); make it readable, or name another directory"


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


def _fingerprint(metadata: dict, hashes: dict[str, str]) -> str:
    what = [metadata["dtype"], metadata["vocab_size"], metadata["eos_id"], *(hashes[split] for split in SPLITS)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def checksum(metadata: dict) -> str:
    """sha256 of all entries but the checksum itself."""
    rest = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

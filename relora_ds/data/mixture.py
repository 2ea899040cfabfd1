"""Prepare what a run trains on: one corpus, or a mixture of several in the ids of one tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from relora_ds.config.data_config import of_part
from relora_ds.data import checks, corpora, tokenizer
from relora_ds.data.cache import cache_root, ensure_directory
from relora_ds.data.preparation import Extent, Part, PreparedData, known_extent, prepare_corpus
from relora_ds.data.trained_validation import warn_of_trained
from relora_ds.data.validation_sets import files_of_sets, prepare_sets

if TYPE_CHECKING:
    from relora_ds.config import DataConfig

T = TypeVar("T")


def prepare(data: DataConfig, seed: int = 0, trust_remote_code: bool = False) -> PreparedData:
    """Tokenize the corpora of the `data.` section, or find them in the cache.

    Call it in one process per host first; the others then find the cache. (Calls that race wait for each other, and a
    call after one that was killed resumes where that was.) `seed` is part of the interface but changes nothing on
    purpose: the tokens, the tokenizer and the held-out documents are the same for every seed, so that seeds can be
    compared; the loader's order is what it seeds. trust_remote_code: see `tokenizer.load`.

    Raises ValueError with every message of `checks.problems`, for a corpus that cannot be read, reached or
    downloaded, without text, without validation text, or with fewer training tokens than one sequence, for a cache
    directory that cannot be made or written, and for pre-tokenized corpora of a mixture in several vocabularies.
    """
    del seed
    if found := checks.problems(data):
        raise ValueError("\n".join(found))
    files_of_sets(data)  # what is wrong with them is said before a corpus is tokenized
    prepared = prepare_corpus(data, trust_remote_code) if data.mix is None else _mixture(data, trust_remote_code)
    warn_of_trained(data)
    if not data.validation_sets:
        return prepared
    given = tokenizer.load(prepared.tokenizer_dir, trust_remote_code)
    return dataclasses.replace(prepared, sets=prepare_sets(data, given))


def _mixture(data: DataConfig, trust_remote_code: bool) -> PreparedData:
    assert data.mix is not None
    shared = _shared_tokenizer(data)
    parts = [
        Part(
            source.label,
            source.weight,
            _of_part(index, prepare_corpus, dataclasses.replace(part, tokenizer=str(shared)), trust_remote_code),
        )
        for index, (source, part) in enumerate(zip(data.mix, data.parts(), strict=True))
    ]
    _require_one_vocabulary(parts, trust_remote_code)
    return combined(parts)


def known_extents(data: DataConfig, trust_remote_code: bool = False) -> list[Extent] | None:
    """Return the extent of each corpus, as `known_extent`; None where that of one is not known."""
    shared = data.tokenizer
    if data.mix is not None and all(map(corpora.is_hashed, data.parts())):
        place = _shared_tokenizer(data, to_train=False)
        shared = None if place is None else str(place)
        if shared is None:
            return None
    found = [known_extent(dataclasses.replace(part, tokenizer=shared), trust_remote_code) for part in data.parts()]
    known = [extent for extent in found if extent is not None]
    return known if len(known) == len(found) else None


def combined(parts: list[Part]) -> PreparedData:
    """Return the corpora of a mixture as one."""
    first = parts[0].data
    about = [[part.weight, part.data.fingerprint] for part in parts]  # what decides the batches
    return dataclasses.replace(
        first,
        train=first.train[:0],
        validation=np.concatenate([part.data.validation for part in parts]),
        validation_words=sum(part.data.validation_words for part in parts),
        validation_bytes=sum(part.data.validation_bytes for part in parts),
        fingerprint=hashlib.sha256(json.dumps(about).encode()).hexdigest(),
        parts=tuple(parts),
    )


def _shared_tokenizer(data: DataConfig, to_train: bool = True) -> str | Path | None:
    """Return the tokenizer that the section names, or that of its pre-tokenized corpora, or one trained on all.

    to_train: False returns None where it would have to be trained.
    """
    if data.tokenizer is not None:
        return data.tokenizer
    for part in data.parts():
        if part.source == "pretokenized":
            assert part.path is not None  # `problems` has said so
            return Path(part.path).expanduser() / "tokenizer"
    opened = [_of_part(index, corpora.open_corpus, part) for index, part in enumerate(data.parts())]
    assert data.mix is not None
    key = [
        [
            [one.weight, part.max_tokens, corpus.sha256]
            for one, part, corpus in zip(data.mix, data.parts(), opened, strict=True)
        ],
        data.vocab_size,
        tokenizer.TRAINING,
        tokenizer.CONFIG,
    ]
    place = cache_root(data) / "tokenizers" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if not to_train:
        return place if _is_tokenizer(place) else None
    return ensure_directory(place, _is_tokenizer, lambda path: _train_tokenizer(path, data, opened))


def _is_tokenizer(directory: Path) -> bool:
    return (directory / "tokenizer.model").is_file()


def _train_tokenizer(directory: Path, data: DataConfig, opened: list[corpora.Corpus]) -> None:
    assert data.mix is not None
    texts = []
    for index, (part, corpus) in enumerate(zip(data.parts(), opened, strict=True)):
        documents = iter(_of_part(index, corpus.open).train)
        if corpus.is_streamed:
            assert part.max_tokens is not None
            documents = corpora.beginning(documents, part.max_tokens)  # no token is less than a byte
        texts.append(documents)
    tokenizer.train(in_proportion(texts, [one.weight for one in data.mix]), data.vocab_size, directory)


def in_proportion(texts: list[Iterator[str]], weights: list[float]) -> Iterator[str]:
    """Yield documents of several corpora so that their characters have the ratios `weights` until one of them ends."""
    characters = [0] * len(texts)
    left = set(range(len(texts)))
    while left:
        index = min(sorted(left), key=lambda i: characters[i] / weights[i])
        text = next(texts[index], None)
        if text is None:
            left.remove(index)
        else:
            characters[index] += len(text)
            yield text


def _require_one_vocabulary(parts: list[Part], trust_remote_code: bool) -> None:
    """Raise ValueError where a pre-tokenized corpus has the ids of another tokenizer."""
    places = dict.fromkeys(part.data.tokenizer_dir for part in parts)
    if len(places) == 1:
        return
    vocabularies = {place: tokenizer.load(place, trust_remote_code).get_vocab() for place in places}
    first = parts[0].data
    for index, part in enumerate(parts):
        differs = None
        if vocabularies[part.data.tokenizer_dir] != vocabularies[first.tokenizer_dir]:
            differs = "is in another vocabulary than"
        elif part.data.eos_id != first.eos_id:  # as of a base model and one that was tuned to chat
            differs = f"ends documents with the id {part.data.eos_id}, and not {first.eos_id} as"
        if differs is not None:
            raise ValueError(
                f"data.mix[{index}].path: {str(part.data.directory)!r} {differs} {parts[0].name}; prepare all corpora "
                "of a mixture with the same data.tokenizer"
            )


def _of_part(index: int, function: Callable[..., T], *arguments: object) -> T:
    """Call a function about one corpus of a mixture; its ValueError names the keys of that one."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(of_part(str(error), index)) from error

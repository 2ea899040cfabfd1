"""Leave near-copies out of training documents: MinHash over 5-grams of words, by datasketch.

A training document is left out if it resembles a validation document, or a training document before it. Which ones are
alike is estimated from 128 hashes (standard error about 0.04 at 0.8); each document costs 1 KiB of memory and about
2 µs a word.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from relora_ds.data.reading import Documents

if TYPE_CHECKING:
    from datasketch import MinHash

NUM_HASHES = 128
# What the index finds is compared, so that one that finds too much costs time, and one that finds too little copies.
TOO_MUCH_OR_LITTLE = (0.02, 0.98)
MOST_OF_INDEX = 0.98  # that an index of so many hashes can be made for
WORDS = 5  # of a shingle, as in the deduplication of most corpora for pre-training


def missing_package() -> str | None:
    """Return why nothing can be left out on this machine, or None."""
    if importlib.util.find_spec("datasketch"):
        return None
    return "needs the package datasketch; pip install '.[dedup]', or use null"


def without_copies(train: Documents, held_out: Documents, threshold: float) -> tuple[Documents, int]:
    """Return (`train` without near-copies, how many there are). Reads all documents.

    threshold: of the Jaccard similarity of the sets of shingles, from which on two documents are copies.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=min(threshold, MOST_OF_INDEX), num_perm=NUM_HASHES, weights=TOO_MUCH_OR_LITTLE)
    hashes: list[MinHash] = []
    dropped: set[int] = set()
    for _, minhash in _hashed(held_out):
        index.insert(len(hashes), minhash)
        hashes.append(minhash)
    for place, minhash in _hashed(train):
        if any(minhash.jaccard(hashes[key]) >= threshold for key in index.query(minhash)):
            dropped.add(place)
            continue
        index.insert(len(hashes), minhash)
        hashes.append(minhash)
    before = train.keep
    return Documents(train.shards, lambda i: i not in dropped and (before is None or before(i))), len(dropped)


def _hashed(documents: Documents) -> Iterator[tuple[int, MinHash]]:
    """Yield (the place of a document among all, its hashes)."""
    from datasketch import MinHash

    empty = MinHash(num_perm=NUM_HASHES)
    for text, place in documents.read():
        if text is None:
            continue
        words = text.lower().split()
        minhash = empty.copy()
        minhash.update_batch(
            {" ".join(words[at : at + WORDS]).encode() for at in range(max(1, len(words) - WORDS + 1))}
        )
        yield place.total - 1, minhash

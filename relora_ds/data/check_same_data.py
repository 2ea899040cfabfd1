"""Do all ranks train on the same tokens? Hosts without a shared disk each tokenize for themselves.

Another version of a tokenizer, another state of a corpus on the hub, a file that one host lacks: nothing else would
notice, and every rank would draw its part of a batch from another permutation of another corpus.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from relora_ds.config import RecipeError

if TYPE_CHECKING:
    from relora_ds.data.preparation import NamedTokens


def require_same_tokens(fingerprint: str, sets: Sequence[NamedTokens] = ()) -> None:
    """Compare `PreparedData.fingerprint` and `PreparedData.sets` over all ranks. Collective.

    Raises RecipeError on every rank when they differ; it names a host for each fingerprint.
    """
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), fingerprint, _fingerprint_of(sets)))
    hosts, of_data, of_sets = zip(*found, strict=True)
    problems = []
    if shown := _differences(hosts, of_data):
        problems.append(
            f"data.source: the ranks have tokenized different data. Fingerprints: {shown}. Give all "
            "hosts the same corpus and tokenizer: `python -m relora_ds prepare` on one of them, copy "
            "the directory to the others, and train with data.source=pretokenized data.path=DIR"
        )
    if shown := _differences(hosts, of_sets):
        problems.append(
            f"data.validation_sets: the ranks have tokenized different texts. Fingerprints: {shown}. Give all hosts "
            "the same files and tokenizer"
        )
    if problems:
        raise RecipeError(problems)


def _fingerprint_of(sets: Sequence[NamedTokens]) -> str:
    """Return a sha256 of the token ids of validation sets, each rank of which evaluates a part."""
    found = hashlib.sha256()
    for one in sets:
        found.update(f"{one.name} {len(one.tokens)} ".encode())
        found.update(one.tokens.data)
    return found.hexdigest()


def _differences(hosts: Sequence[str], fingerprints: Sequence[str]) -> str:
    """Return which ranks have which fingerprint; "" where all have the same. Both are by rank."""
    found: dict[str, list[str]] = {}
    for rank, (host, one) in enumerate(zip(hosts, fingerprints, strict=True)):
        found.setdefault(one, []).append(f"{host} (rank {rank})")
    return "; ".join(f"{_some(names)}: {one[:16]}" for one, names in found.items()) if len(found) > 1 else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

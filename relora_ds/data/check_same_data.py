"""Do all ranks train on the same tokens? Hosts without a shared disk each tokenize for themselves.

Another version of a tokenizer, another state of a corpus on the hub, a file that one host lacks: nothing else would
notice, and every rank would draw its part of a batch from another permutation of another corpus.
"""

from __future__ import annotations

import socket

import torch.distributed as dist

from relora_ds.config import RecipeError


def require_same_tokens(fingerprint: str) -> None:
    """Compare `PreparedData.fingerprint` over all ranks. Collective.

    Raises RecipeError on every rank when they differ; it names a host for each fingerprint.
    """
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), fingerprint))
    hosts: dict[str, list[str]] = {}
    for rank, (host, other) in enumerate(found):
        hosts.setdefault(other, []).append(f"{host} (rank {rank})")
    if len(hosts) > 1:
        shown = "; ".join(f"{_some(names)}: {other[:16]}" for other, names in hosts.items())
        raise RecipeError(
            [
                f"data.source: the ranks have tokenized different data. Fingerprints: {shown}. Give all "
                "hosts the same corpus and tokenizer: `python -m relora_ds prepare` on one of them, copy "
                "the directory to the others, and train with data.source=pretokenized data.path=DIR"
            ]
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

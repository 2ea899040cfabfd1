"""Random generators that depend on a key and nothing else."""

import hashlib

import torch


def keyed_generator(key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by the text `key`: the same stream in every process, whatever ran before."""
    return torch.Generator(device=device).manual_seed(keyed_seed(key))


def keyed_seed(key: str) -> int:
    """Return a 63-bit seed from the text `key` (Python's own `hash` of a string differs between processes)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1

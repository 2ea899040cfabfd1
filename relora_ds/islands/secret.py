"""The secret that the server and all islands share, and the keys made of it. It stands in no recipe and in no log."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

VARIABLE = "RELORA_ISLANDS_SECRET"
MIN_LENGTH = 16


@dataclass(frozen=True)
class Keys:
    """A CURVE key pair, Z85-encoded. All who know the secret have the same one."""

    public: bytes
    secret: bytes = field(repr=False)


def read_secret(file: Path | None = None) -> str:
    """Return the secret from a file, or without one from the environment.

    Raises:
        ValueError: there is none, or it is short. OSError: the file cannot be read.
    """
    source = f"--secret-file: {file}" if file else VARIABLE
    secret = file.read_text(encoding="utf-8").strip() if file else os.environ.get(VARIABLE, "").strip()
    if not secret:
        raise ValueError(
            f"{source} holds no secret; put the same one there for the server and every island, "
            "e.g. the output of `openssl rand -hex 32`"
        )
    return checked(secret, source)


def checked(secret: str, source: str) -> str:
    """Return the secret.

    Raises:
        ValueError: it is short.
    """
    if len(secret) < MIN_LENGTH:
        raise ValueError(
            f"{source}: {len(secret)} characters are too few for a secret; take at least {MIN_LENGTH}, "
            "e.g. the output of `openssl rand -hex 32`"
        )
    return secret


def keys_of(secret: str) -> Keys:
    """Return the key pair of a secret: its SHA-256 is the private key."""
    import zmq
    from zmq.utils import z85

    private = z85.encode(hashlib.sha256(secret.encode()).digest())
    return Keys(public=zmq.curve_public(private), secret=private)

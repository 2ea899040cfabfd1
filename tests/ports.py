"""Ports for processes that a test starts."""

import random
import socket


def free_port() -> int:
    """A free TCP port below those that Linux hands out for connections, so that none of gloo's takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port

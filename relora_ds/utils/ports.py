"""Ports for processes that are started here."""

import random
import socket


def free_port() -> int:
    """Return a free TCP port.

    It is below those that Linux hands out for connections, so that none of gloo's takes it meanwhile.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port

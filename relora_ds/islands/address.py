"""Addresses of the server: `tcp://HOST:PORT`, or short `HOST:PORT`."""

import re

_ADDRESS = re.compile(r"(?:tcp://)?(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._*-]+):(?P<port>\d{1,5})")


def endpoint(text: str, field: str, *, to_listen: bool = False) -> str:
    """Return an address as ZeroMQ takes it; port 0 means any free one to who listens.

    Raises:
        ValueError: it is no address; the message calls it `field`.
    """
    found = _ADDRESS.fullmatch(text)
    if not found or int(found["port"]) not in range(0 if to_listen else 1, 1 << 16):
        example = "tcp://0.0.0.0:5555" if to_listen else "tcp://10.0.0.1:5555"
        raise ValueError(f"{field}: {text!r} is not HOST:PORT; use e.g. {example}")
    return f"tcp://{found['host']}:{'*' if int(found['port']) == 0 else found['port']}"

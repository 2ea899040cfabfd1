import socket

import pytest


@pytest.fixture
def free_port() -> str:
    with socket.socket() as s:
        s.bind(("", 0))
        return str(s.getsockname()[1])

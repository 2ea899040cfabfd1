import pytest

from tests import ports


@pytest.fixture
def free_port() -> str:
    return str(ports.free_port())

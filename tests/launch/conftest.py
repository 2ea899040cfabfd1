import pytest

from relora_ds.utils import ports


@pytest.fixture
def free_port() -> str:
    return str(ports.free_port())

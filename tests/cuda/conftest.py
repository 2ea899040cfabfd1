from pathlib import Path

import pytest

from tests.cuda.gpus import number_of_gpus


def pytest_collection_modifyitems(items):
    """What is in this folder runs where there is a GPU."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and not number_of_gpus():
        for item in here:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))

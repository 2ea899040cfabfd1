import os
import sys

import pytest

from tests.devices import hide_gpus
from tests.selection import combinations, covering

hide_gpus()  # before a test imports torch

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_rank():
    """pytest's own process does not stay a rank: a test after it would take that for a launcher's and start none."""
    before = {name for name in LAUNCHERS if name in os.environ}
    yield
    for name in LAUNCHERS:
        if name not in before:
            os.environ.pop(name, None)
    distributed = sys.modules.get("torch.distributed")
    assert distributed is None or not distributed.is_initialized(), "what needs a process group uses tests.ranks"


# Folders whose files take seconds. In the others there are files of minutes: whole runs, launchers, engines.
_SHORT = ("tests", "config", "cuda", "data", "docs", "lowrank", "mutants", "utils")


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(items):
    """Leave combinations to the slow tests (`each_value_once`), and begin with the long files.

    Every worker takes one file at a time, and the last ones should be short.
    """
    for group in combinations(items):
        for item in set(group) - set(covering(group)):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.parent.name in _SHORT)

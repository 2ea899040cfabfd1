import json
import os
from pathlib import Path

import pytest

from tests.cuda.gpus import number_of_gpus

# The most telling first, where time is short.
ORDER = ("test_layers", "test_training", "test_restarts", "test_merges", "test_trainer", "test_compiled")


def pytest_collection_modifyitems(items):
    """What is in this folder runs where there is a GPU."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if not number_of_gpus():
        for item in here:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
    others = [item for item in items if item not in here]
    items[:] = [*others, *sorted(here, key=lambda item: ORDER.index(item.path.stem))]


def pytest_runtest_logreport(report):
    """A line for each test, where `bench gpu-check` wants to know."""
    path = os.environ.get("RELORA_DS_TEST_REPORT")
    if path is None or not (report.when == "call" or report.failed or report.skipped):
        return
    entry = {"name": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
    if report.failed:
        entry["error"] = report.longreprtext[-2000:]
    elif report.skipped:
        entry["skipped"] = report.longrepr[2].removeprefix("Skipped: ")
    with open(path, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")

"""docs/reference/run_directory.md and docs/guides/faults.md have what a run writes and how it ends."""

import dataclasses
import re

import pytest

from relora_ds.checkpoint.job import Written
from relora_ds.training import exit_codes
from relora_ds.training.hooks.loggers import LOGGERS
from relora_ds.training.metrics_log import TENSORBOARD_TAGS
from relora_ds.training.spikes import Spike
from relora_ds.training.validation import SET_PREFIX, Evaluation
from relora_ds.zero.restart import RestartReport
from tests.docs.pages import DOCS

PAGE = (DOCS / "reference/run_directory.md").read_text(encoding="utf-8")
WRITTEN = {"eval": Evaluation, "restart": RestartReport, "checkpoint": Written, "spike": Spike}


@pytest.mark.parametrize("kind", [*TENSORBOARD_TAGS, "checkpoint", "spike"])
def test_every_field_of_a_line_is_explained(kind):
    fields = set(TENSORBOARD_TAGS.get(kind, {}))
    if kind in WRITTEN:
        fields |= {field.name for field in dataclasses.fields(WRITTEN[kind])} - {"step", "error", "t", "sets"}
    assert fields <= set(re.findall(r"`(\w+)`", PAGE)), kind
    assert f"`{SET_PREFIX}NAME`" in PAGE


def test_every_exit_code_is_explained():
    table = (DOCS / "guides/faults.md").read_text(encoding="utf-8").split("## Overview")[0]
    codes = {value for name, value in vars(exit_codes).items() if name.isupper()}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == codes
    assert "another process writes the run" in next(line for line in table.splitlines() if line.startswith("| 4 |"))


def test_every_logger_has_a_line():
    text = (DOCS / "guides/logging.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text.split("## Hooks")[0], re.MULTILINE) == list(LOGGERS)

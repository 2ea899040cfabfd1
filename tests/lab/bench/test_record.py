"""What a measurement is recorded with."""

import json

import pytest

from relora_ds.lab.bench import record


def test_conditions_name_what_a_figure_depends_on_and_no_day():
    found = record.conditions()
    assert {"device", "cores", "threads", "python", "torch", "deepspeed", "transformers", "relora_ds"} <= set(found)
    assert json.loads(json.dumps(found)) == found == record.conditions()


@pytest.mark.parametrize(("version", "marked"), [("0.1.0", True), ("0.1.9", True), ("0.2.0", False), ("1.0.0", False)])
def test_losses_of_other_initial_weights_are_marked(version, marked):
    remark = record.remark_on_seeds({"relora_ds": version})
    assert ("as before relora_ds 0.2.0" in (remark or "")) == marked


def test_losses_that_are_measured_now_are_not_marked():
    assert record.remark_on_seeds(record.conditions()) is None and record.remark_on_seeds({}) is None


def test_a_table_of_rows():
    assert record.rows_as_markdown([["a", "b"], ["c", "1"]]) == "| a | b |\n| --- | ---: |\n| c | 1 |"

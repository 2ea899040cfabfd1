"""What a measurement is recorded with."""

import json

import pytest

from relora_ds.lab.bench import environment


def test_conditions_name_what_a_figure_depends_on_and_no_day():
    found = environment.environment_info()
    assert {"device", "cores", "threads", "python", "torch", "deepspeed", "transformers", "relora_ds", "commit"} <= set(
        found
    )
    assert json.loads(json.dumps(found)) == found == environment.environment_info()


@pytest.mark.parametrize(("version", "marked"), [("0.1.0", True), ("0.1.9", True), ("0.2.0", False), ("1.0.0", False)])
def test_losses_of_other_initial_weights_are_marked(version, marked):
    remark = environment.remark_on_seeds({"relora_ds": version})
    assert (remark is not None) == marked
    assert not marked or "since relora_ds 0.2.0 the same seed gives other initial weights" in remark


def test_losses_that_are_measured_now_are_not_marked():
    assert (
        environment.remark_on_seeds(environment.environment_info()) is None and environment.remark_on_seeds({}) is None
    )


def test_a_table_of_rows():
    assert environment.rows_as_markdown([["a", "b"], ["c", "1"]]) == "| a | b |\n| --- | ---: |\n| c | 1 |"

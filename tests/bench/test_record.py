"""What a measurement is recorded with."""

import json

from relora_ds.bench import record


def test_conditions_name_what_a_figure_depends_on_and_no_day():
    found = record.conditions()
    assert {"device", "cores", "threads", "python", "torch", "deepspeed", "transformers", "relora_ds"} <= set(found)
    assert json.loads(json.dumps(found)) == found == record.conditions()


def test_a_table_of_rows():
    assert record.rows_as_markdown([["a", "b"], ["c", "1"]]) == "| a | b |\n| --- | ---: |\n| c | 1 |"

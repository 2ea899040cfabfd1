"""Nothing is lost, whatever happens to a run directory and whatever the user does next."""

import pytest

from tests.faults.accidents import ACCIDENTS
from tests.faults.mishaps import MISHAPS
from tests.faults.scenarios import ACTIONS, ENDINGS, cell, make_templates, meanwhile

# One of each kind is tried every time, the whole table with the slow tests.
OFTEN = {
    ("nothing", "start"),
    ("rank 0 was killed in a save", "requeue"),
    ("newest: a bit flipped", "requeue"),
    ("newest: input/output errors", "prune"),
    ("newest: input/output errors", "resume"),
    ("newest: not in 2 listings", "resume"),
    ("finished, all checkpoints deleted", "resume"),
    ("metrics: a line null", "resume"),
    ("a run in the run", "overwrite"),
    ("a read-only disk", "resume"),
    ("nothing", "beside"),
}
OFTEN_WHILE_TRAINING = {("the newest checkpoint is moved away", "stopped")}


def cells(rows, columns, often):
    return [
        pytest.param(row, column, marks=() if (row, column) in often else pytest.mark.slow)
        for row in rows
        for column in columns
    ]


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    return make_templates(tmp_path_factory.mktemp("templates"))


@pytest.mark.parametrize(("accident", "action"), cells(ACCIDENTS, ACTIONS, OFTEN))
def test_between_two_starts(templates, tmp_path, accident, action):
    assert cell(accident, action, templates, tmp_path) is None


@pytest.mark.parametrize(("mishap", "ending"), cells(MISHAPS, ENDINGS, OFTEN_WHILE_TRAINING))
def test_while_it_trains(templates, tmp_path, mishap, ending):
    assert meanwhile(mishap, ending, templates, tmp_path) is None


def test_the_cells_tried_often_are_in_the_table():
    assert {(row, column) for row in ACCIDENTS for column in ACTIONS} >= OFTEN
    assert {(row, column) for row in MISHAPS for column in ENDINGS} >= OFTEN_WHILE_TRAINING

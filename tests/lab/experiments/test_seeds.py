"""Further seeds of the best row of every sweep: which they are, and that `reproduce` trains them last."""

import pytest

from relora_ds.__main__ import main
from relora_ds.lab.experiments import budget, runner, seeds
from relora_ds.lab.experiments.runs import Results, Run
from relora_ds.lab.experiments.suites import read_suite
from tests.lab.experiments.test_reproduce import Pretended

SUITE = read_suite("rivals", "tiny")
SWEPT = [row for row in SUITE.rows if row.group == "CoLA"]


@pytest.fixture
def ended(tmp_path):
    """Results, and a function that lets the first seed of a row end with a loss."""
    results = Results(tmp_path)
    return results, lambda row, loss: results.write(Run.of(row, 0), {"seed": 0, "val_loss": loss})


def test_a_sweep_has_a_best_row_when_all_of_it_has_ended(ended):
    results, end = ended
    for row, loss in zip(SWEPT[:-1], (3.5, 3.4, 3.6), strict=True):
        end(row, loss)
    assert seeds.runs_of_best(SUITE, SWEPT, results) == ([], 2)
    end(SWEPT[-1], 3.7)
    found, unknown = seeds.runs_of_best(SUITE, SWEPT, results)
    assert [(run.row, run.seed) for run in found] == [(SWEPT[1], 1), (SWEPT[1], 2)] and unknown == 0


def test_a_row_that_was_asked_for_and_is_not_the_best_gets_no_more_seeds(ended):
    results, end = ended
    for row, loss in zip(SWEPT, (3.5, 3.4, 3.6, 3.7), strict=True):
        end(row, loss)
    assert seeds.runs_of_best(SUITE, SWEPT[:1], results) == ([], 0)
    assert seeds.runs_of_best(SUITE, SWEPT[:1], Results(results.directory / "none")) == ([], 0), (
        "it may not be the best"
    )
    assert len(seeds.runs_of_best(SUITE, SWEPT[1:2], results)[0]) == 2


def test_other_suites_have_none(ended):
    suite = read_suite("lr", "tiny")
    assert seeds.runs_of_best(suite, suite.rows, ended[0]) == ([], 0)


@pytest.mark.parametrize("options", [[], ["--seeds", "1"]])
def test_reproduce_trains_them_after_the_others(options, monkeypatch, tmp_path, capsys):
    pretended = Pretended(tmp_path / "runs")
    monkeypatch.setattr(runner, "Runner", lambda *_: pretended)
    monkeypatch.setattr(budget, "trial", lambda _: lambda _: 1000.0)
    words = ["reproduce", "rivals", "--rows", "full rank", "CoLA", "--runs", str(tmp_path / "runs"), *options]
    assert main(words) == 0
    first = [("full rank", 0), *((row.name, 0) for row in SWEPT)]
    best = min(first[1:], key=lambda one: len(one[0]))[0]  # by the losses that Pretended leaves
    if options:
        assert pretended.trained == first
        return
    assert "up to 2 runs more, not counted: further seeds" in capsys.readouterr().out
    more = [("full rank", 1), ("full rank", 2), (best, 1), (best, 2)]
    assert pretended.trained == [*first, *more]
    assert main(words) == 0 and len(pretended.trained) == 9

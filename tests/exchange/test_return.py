"""Islands that stay away and come back: the others go on, and whoever returns makes good what it has missed."""

import pytest
import torch

from tests.exchange import cases
from tests.exchange.cases import EVERY, at_once, worlds
from tests.islands.servers import serving


def check_equal(mine: dict, other: dict) -> None:
    assert {key: mine[key] for key in ("t", "round", "restarts")} == {
        key: other[key] for key in ("t", "round", "restarts")
    }
    for what in ("weights", "bases"):
        for name, value in mine[what].items():
            assert torch.equal(value, other[what][name]), name


@pytest.mark.parametrize(
    ("method", "stages", "how"),
    [
        ("relora", (1, 3), {"compress": "int4", "outer_optimizer": "nesterov"}),
        ("galore", (2, 0), {}),
        ("full", (3, 1), {"compress": "int8"}),
    ],
)
@pytest.mark.slow  # test_runs has whole runs that come back
@pytest.mark.parametrize("saved_at", [EVERY, EVERY + 1])
def test_from_a_checkpoint(method, stages, how, saved_at, tmp_path):
    """Island 1 leaves after step `saved_at` and comes back when the others are two exchanges further."""
    how = {"method": method, "total": 5 * EVERY, **how}
    with serving(tmp_path / "rounds", timeout_s=1.0) as server, worlds(1, 2) as (first, second):
        begin = [
            lambda: first.run(cases.start, 0, server.address, 2, stage=stages[0], **how),
            lambda: second.run(cases.start, 1, server.address, 2, stage=stages[1], **how),
        ]
        at_once(*begin)
        at_once(lambda: first.run(cases.go, EVERY), lambda: second.run(cases.go, saved_at, str(tmp_path / "saved")))
        second.run(cases.end)
        alone = first.run(cases.go, 3 * EVERY)[0]
        assert alone["missing"] == ("0001",) and alone["round"] == 3

        path = str(tmp_path / "saved")
        back = second.run(cases.start, 1, server.address, 2, load=path, stage=stages[1], **how)
        assert back == [3 * EVERY, 3 * EVERY]
        check_equal(second.run(cases.go, 0)[0], alone)
        together = at_once(lambda: first.run(cases.go, 4 * EVERY), lambda: second.run(cases.go, 4 * EVERY))
        assert together[0][0]["missing"] == ()
        check_equal(together[1][0], together[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["relora", "full"])
def test_a_resume_is_exact(method, tmp_path):
    """Two islands that are stopped within a cycle end as those that are not: momenta and errors were saved."""
    how = {"method": method, "compress": "int4", "total": 3 * EVERY}

    def train(directory, *, stops: bool) -> dict:
        with serving(directory / "rounds") as server, worlds(1, 2) as found:
            everyone = list(enumerate(found))

            def all_do(case, arguments, **more):
                return at_once(*(lambda i=i, w=w: w.run(case, *arguments(i), **more) for i, w in everyone))

            all_do(cases.start, lambda i: (i, server.address, 2), **how)
            if stops:
                all_do(cases.go, lambda i: (EVERY + 1, str(directory / str(i))))
                at_once(*(lambda w=w: w.run(cases.end) for _, w in everyone))
                again = (
                    lambda i=i, w=w: w.run(cases.start, i, server.address, 2, load=str(directory / str(i)), **how)
                    for i, w in everyone
                )
                at_once(*again)
            return all_do(cases.go, lambda i: (3 * EVERY,))[0][0]

    check_equal(train(tmp_path / "stopped", stops=True), train(tmp_path / "whole", stops=False))


@pytest.mark.slow
def test_one_that_is_late_follows_the_others(tmp_path):
    """Its own update of the rounds that it was late for is given up."""
    with serving(tmp_path, timeout_s=0.5) as server, worlds(1, 1) as (first, second):
        at_once(*(lambda i=i, w=w: w.run(cases.start, i, server.address, 2) for i, w in enumerate((first, second))))
        second.run(cases.go, EVERY - 1)
        alone = first.run(cases.go, 2 * EVERY)[0]
        late = second.run(cases.go, EVERY)[0]
        check_equal(late, alone)


def test_islands_that_differ_are_refused(tmp_path):
    with serving(tmp_path) as server, worlds(1, 1) as (first, second):
        first.run(cases.start, 0, server.address, 2)
        for changes, words in (
            ({"total": 100}, "schedule.total_steps is 100 here and 9 on island '0000'"),
            ({"model_seed": 1}, "the weights at the start is"),
        ):
            with pytest.raises(AssertionError, match=words):
                second.run(cases.start, 1, server.address, 2, **changes)

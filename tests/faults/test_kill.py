"""The plug is pulled; the run that goes on is the run that would have been, to the bit."""

import pytest

from tests.faults.kills import PLACES, attempt, require_equal, untouched

STEPS = 24  # four beyond the first restart


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    untouched(directory, STEPS)
    return directory


@pytest.mark.parametrize(
    "kills",
    [
        [(1, "a restart: before the ranks agree", 1)],  # in a save: test_scenarios.py
        pytest.param(
            [
                (0, "a save: before a file is on the disk", 3),
                (None, "a restart: before the broadcast", 5),
                (1, "a restart: before the ranks agree", 1),
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [(0, "a save: before the rename", 2), (1, "the switch: building", 1), (0, "a save: before latest", 2)],
            marks=pytest.mark.slow,
        ),
        pytest.param([(None, None, 0.4), (0, None, 0.8), (1, None, 1.2)], marks=pytest.mark.slow),
    ],
    ids=["restart", "save and restart", "transition", "instants"],
)
def test_killed_again_and_again(whole, tmp_path, kills):
    for number, (rank, place, after) in enumerate(kills):
        ended = attempt(tmp_path / "r", STEPS, rank=rank, place=place, after=after)
        # A fast machine may be at the run's end before the last instant.
        assert not ended or place is None and number > 0, f"nobody died in {place}"
    assert ended or attempt(tmp_path / "r", STEPS, rank=-1, place=None, after=0)
    require_equal(tmp_path / "r", whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, None])
@pytest.mark.parametrize("place", PLACES)
def test_every_place(whole, tmp_path, place, rank):
    attempt(tmp_path / "r", STEPS, rank=rank, place=place, after=2 if place.startswith("a save") else 1)
    assert attempt(tmp_path / "r", STEPS, rank=-1, place=None, after=0)
    require_equal(tmp_path / "r", whole)

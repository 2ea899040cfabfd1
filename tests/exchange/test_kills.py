"""No run is lost, and no merge is lost or made twice, whatever is killed."""

import pytest

from tests.exchange.kills import live


@pytest.mark.slow
@pytest.mark.parametrize("kills", [50])
def test_killed_again_and_again(kills, tmp_path):
    counts, history = live(tmp_path, kills, seed=0)
    assert counts.get("all ranks", 0) + counts.get("one rank", 0) >= kills / 2, "the runs ended before"
    assert any(decision["missing"] for decision in history)

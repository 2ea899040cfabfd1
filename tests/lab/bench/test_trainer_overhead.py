"""The trainer's steps and bare ones take turns on one engine."""

import argparse

import pytest

from relora_ds.lab.bench import startup, trainer_overhead
from tests.ranks import ranks


def measured() -> dict:
    return trainer_overhead.measure(argparse.Namespace(config="tiny", overrides=["log.every=3"], blocks=2))


def test_blocks_take_turns():
    (result,) = ranks(1).run(measured)
    assert len(result["trainer_s"]) == len(result["bare_s"]) == 2 and result["log_every"] == 3
    assert all(seconds > 0 for seconds in result["trainer_s"] + result["bare_s"])
    assert "| tiny log.every=3 | 1 |" in trainer_overhead.markdown(result)


@pytest.mark.slow
def test_startup_ends_with_the_first_step():
    result = startup.run(argparse.Namespace(config="tiny", ranks=1, repeats=1, overrides=["seed=3"]))
    for start in [result["empty_cache_s"], *result["full_cache_s"]]:
        assert list(start) == list(startup.STAGES) and all(seconds >= 0 for seconds in start.values())
    assert "| in all |" in startup.markdown(result)

"""Switches of rows of A and columns of B, as in plain PyTorch, at every ZeRO stage."""

import functools

import pytest

from tests.parity import switching
from tests.ranks import ranks

expected = functools.cache(switching.reference)


def check(results: list[dict], plain: dict, transposed: bool = False) -> None:
    result = results[0]
    for other in results:
        assert other["losses"] == result["losses"] and other["norms"] == result["norms"]
    assert min(result["norms"]) < switching.CLIP < max(result["norms"]), "clipping should act in some steps, not in all"
    assert result["switched"] == plain["switched"]
    assert all(min(counts) > 2 for counts in plain["switched"].values())
    worst = max(abs(a - b) / abs(b) for a, b in zip(result["losses"], plain["losses"], strict=True))
    assert worst <= 1e-5, f"losses differ by {worst:.2e}"
    for what in ("merged", "frozen"):
        for name, weight in plain[what].items():
            found = result[what][name].t() if transposed else result[what][name]
            assert (found - weight).norm() <= 1e-4 * weight.norm(), (what, name)


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_and_weights_equal_plain_pytorch(stage, accumulation):
    check(ranks(2).run(switching.train_case, stage, accumulation=accumulation), expected())


def test_one_rank_alone():
    check(ranks(1).run(switching.train_case, 1), expected())


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_weights_that_are_stored_transposed(stage):
    check(ranks(2).run(switching.train_case, stage, family="gpt2"), expected("gpt2"), transposed=True)

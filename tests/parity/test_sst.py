"""Owners that have the factors of weights train as layers that multiply with them, at every ZeRO stage."""

import functools

import pytest

from tests.parity import sst
from tests.ranks import ranks

TOLERANCE, CLIP = 1e-5, 0.1
expected = functools.cache(sst.reference)


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_and_weights_equal_plain_pytorch(stage, accumulation):
    one, other = ranks(2).run(sst.train_case, stage, accumulation=accumulation)
    assert one["losses"] == other["losses"] and all((one["weights"][n] == w).all() for n, w in other["weights"].items())
    plain = expected()
    worst = max(abs(a - b) / abs(b) for a, b in zip(one["losses"], plain["losses"], strict=True))
    assert worst <= TOLERANCE, f"losses differ by {worst:.2e}"
    for name, weight in plain["weights"].items():
        assert (one["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name
    owned = {name.rpartition("/")[0] for name in one["states"]}
    assert owned and owned.isdisjoint(name.rpartition("/")[0] for name in other["states"]), "moments have one owner"


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_clipping_sees_what_trains(stage):
    clipped, plain = sst.reference(CLIP), expected()
    one, _ = ranks(2).run(sst.train_case, stage, clip=CLIP)
    assert one["losses"] == pytest.approx(clipped["losses"], rel=TOLERANCE)
    assert abs(clipped["losses"][-1] - plain["losses"][-1]) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(3, {}, marks=pytest.mark.slow),
        (3, {"offload_param": {"device": "cpu"}}),
    ],
)
def test_with_what_deepspeed_offloads(stage, zero):
    """The factors stay where they are multiplied; the optimizer of the rest, and stored weights, are on the host."""
    one, _ = ranks(2).run(sst.train_case, stage, offload=True, zero=zero)
    assert one["losses"] == pytest.approx(expected()["losses"], rel=TOLERANCE)
    for name, weight in expected()["weights"].items():
        assert (one["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_one_rank_alone():
    [one] = ranks(1).run(sst.train_case, 1)
    assert one["losses"] == pytest.approx(expected()["losses"], rel=TOLERANCE)

"""Steps of factors in fp16, whose gradients have a loss scale, on emulated GPUs: not every CPU computes in fp16."""

import functools

import pytest

from tests.emulated_cuda import factors
from tests.emulated_cuda.pool import emulated_ranks


@functools.cache
def trained(stage: int, precision: str):
    return emulated_ranks().run(factors.run, stage, precision)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_losses_and_norms_are_those_of_fp32(stage):
    """Clipping sees the norm without the loss scale, which Adam alone would not show."""
    for (losses, norms), (others, other_norms) in zip(trained(stage, "fp16"), trained(1, "fp32"), strict=True):
        assert losses == pytest.approx(others, rel=1e-2) and losses[-1] < losses[0]
        assert norms == pytest.approx(other_norms, rel=3e-2)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_an_overflow_changes_nothing_and_halves_the_loss_scale(stage):
    first = 2**factors.SCALE
    for result, (losses, _) in zip(emulated_ranks().run(factors.overflow, stage), trained(stage, "fp16"), strict=True):
        assert result["seen"] == [(False, [], first / 2), (False, [], first / 4)]
        assert result["losses"] == pytest.approx(losses[3:], rel=1e-3), "as if they had not been"

"""What a one-sided chain leaves out reaches W every few steps, as in plain PyTorch, at every ZeRO stage."""

import functools

import pytest

from relora_ds.lowrank.nf4 import NF4
from tests.parity import residual
from tests.parity.residual import EVERY, RESTART_EVERY, STEPS
from tests.ranks import ranks
from tests.zero.restarts import BLOCKS

# The iteration takes small singular values, and the rounding in them, up to 485 times.
TOLERANCE = 1e-5
expected = functools.cache(residual.reference)


def check(results: list[dict], plain: dict, of_weights: float = 1e-3) -> None:
    result = results[0]
    assert result["restarts"] == list(range(RESTART_EVERY, STEPS, RESTART_EVERY)) and len(result["restarts"]) == 2
    assert result["updates"] == STEPS // EVERY
    for other in results:
        assert other["losses"] == result["losses"] and other["stored"] == result["stored"]
    assert len({*result["stored"]}) == len(result["stored"])
    worst = max(abs(a - b) / abs(b) for a, b in zip(result["losses"], plain["losses"], strict=True))
    assert worst <= TOLERANCE, f"losses differ by {worst:.2e}"
    for name, weight in plain["weights"].items():
        assert (result["weights"][name] - weight).norm() <= of_weights * weight.norm(), name
    gradients = {name: value for result in results for name, value in result["gradients"].items()}
    assert gradients.keys() == plain["gradients"].keys()
    for name, value in plain["gradients"].items():
        assert (gradients[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_and_weights_equal_plain_pytorch(stage, accumulation):
    check(ranks(2).run(residual.train_case, stage, accumulation=accumulation), expected())


def test_one_rank_alone():
    check(ranks(1).run(residual.train_case, 1), expected())


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        (3, {"relora": (("frozen_placement", "replicated"),)}),
        pytest.param(1, {"offload": True}, marks=pytest.mark.slow),
        pytest.param(3, {"offload": True}, marks=pytest.mark.slow),
        pytest.param(2, {"relora": (("product", "folded"),)}, marks=pytest.mark.slow),
    ],
)
def test_other_placements_and_products(stage, how):
    check(ranks(2).run(residual.train_case, stage, **how), expected())


@pytest.mark.parametrize(("stage", "family", "of_weights"), [(1, "gpt2", 1e-3), (3, "mixtral", 1e-2)])
def test_other_layouts(stage, family, of_weights):
    """Weights that are `[in, out]`, and experts, of which not every rank uses each in every step.

    The tokens of an expert are few: its gradient is nearly 0 in some directions, where rounding is orthogonalised.
    """
    check(ranks(2).run(residual.train_case, stage, family=family), expected(family), of_weights)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_with_weight_decay(stage):
    """Forward multiplies W by ρ, and so with what is added to W within a cycle."""
    check(ranks(2).run(residual.train_case, stage, weight_decay=1.0), expected(weight_decay=1.0))


def in_nf4(weight):
    return NF4().dequantize(NF4().quantize(weight, weight.dtype), weight.shape, weight.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_in_nf4_with_moments_that_restarts_keep(stage):
    """Masters have every update, and forward reads what nf4 leaves of them.

    Where a master lies between two codes, its last digits decide which one, and that weight's path is another from
    there: in plain PyTorch too, runs in fp32 and in fp64 come to differ in weights by more than in losses.
    """
    plain = residual.reference(reset="none", rounded=in_nf4, **BLOCKS)
    relora = (("optimizer_reset", "none"), ("frozen_dtype", "nf4"))
    check(ranks(2).run(residual.train_case, stage, relora=relora, **BLOCKS), plain)

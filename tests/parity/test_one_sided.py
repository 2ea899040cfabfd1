"""One-sided chains, of which only B trains, equal plain single-process PyTorch at every ZeRO stage."""

import functools

import pytest

from tests.parity import cases
from tests.parity.test_parity import SHORT, STEPS, _compare
from tests.ranks import ranks

# Rotated moments, and pruned ones a little, magnify rounding: changing the reference's W by 3e-8 of itself in each step
# changes its losses by 2e-6 where they are rotated, 8e-7 where they are pruned and 4e-7 where they are kept.
TOLERANCE = {"rotate": 1e-5, "magnitude_joint": 3e-6, "none": 1e-6}
# ρ of weight decay is rounding of that kind; `tests/zero/test_weight_decay.py` has it.
PLAIN = {"weight_decay": 0.0}
reference_losses = functools.cache(functools.partial(cases.reference_losses, one_sided=True, **PLAIN))


@pytest.mark.parametrize(
    ("stage", "reset"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0, "rotate"), (1, "rotate"), (2, "none"), (3, "none"))  # none: also test_weight_decay
        ),
        (3, "rotate"),
        (1, "magnitude_joint"),
    ],
)
def test_losses_equal_plain_pytorch(stage, reset):
    results = ranks(2).run(cases.train_case, **PLAIN, stage=stage, relora=cases.one_sided_config(optimizer_reset=reset))
    _compare(results[0], reference_losses(reset), TOLERANCE[reset], STEPS)
    assert results[0]["losses"] == results[1]["losses"]


def test_folded_products():
    relora = cases.one_sided_config(product="folded")
    _compare(
        ranks(2).run(cases.train_case, SHORT, **PLAIN, stage=3, relora=relora)[0],
        reference_losses("rotate"),
        TOLERANCE["rotate"],
    )


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_with_gradient_accumulation(stage):
    result = ranks(2).run(
        cases.train_case, SHORT, **PLAIN, stage=stage, accumulation=3, relora=cases.one_sided_config()
    )[0]
    _compare(result, reference_losses("rotate"), TOLERANCE["rotate"])


@pytest.mark.parametrize(("stage", "family"), [pytest.param(1, "gpt2", marks=pytest.mark.slow), (3, "mixtral")])
def test_other_layouts(stage, family):
    relora = cases.one_sided_config(family)
    result = ranks(2).run(cases.train_case, SHORT, **PLAIN, stage=stage, family=family, relora=relora)[0]
    _compare(result, reference_losses("rotate", family), TOLERANCE["rotate"])


def test_replicated_bases_at_stage_3():
    relora = cases.one_sided_config(frozen_placement="replicated")
    _compare(
        ranks(2).run(cases.train_case, SHORT, **PLAIN, stage=3, relora=relora)[0],
        reference_losses("rotate"),
        TOLERANCE["rotate"],
    )

"""One-sided chains, of which only B trains, equal plain single-process PyTorch at every ZeRO stage."""

import functools

import pytest

from tests.parity import cases
from tests.parity.test_parity import _compare
from tests.ranks import ranks

reference_losses = functools.cache(functools.partial(cases.reference_losses, one_sided=True))


@pytest.mark.parametrize(
    ("stage", "reset"), [(0, "rotate"), (1, "rotate"), (2, "none"), (3, "rotate"), (3, "none"), (1, "magnitude_joint")]
)
def test_losses_equal_plain_pytorch(stage, reset):
    results = ranks(2).run(cases.train_case, stage=stage, relora=cases.one_sided_config(optimizer_reset=reset))
    _compare(results[0], reference_losses(reset), 1e-6)
    assert results[0]["losses"] == results[1]["losses"]


def test_folded_products():
    relora = cases.one_sided_config(product="folded")
    _compare(ranks(2).run(cases.train_case, stage=3, relora=relora)[0], reference_losses("rotate"), 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_with_gradient_accumulation(stage):
    result = ranks(2).run(cases.train_case, stage=stage, accumulation=4, relora=cases.one_sided_config())[0]
    _compare(result, reference_losses("rotate"), 1e-6)


@pytest.mark.parametrize(("stage", "family"), [(1, "gpt2"), (3, "mixtral")])
def test_other_layouts(stage, family):
    relora = cases.one_sided_config(family)
    result = ranks(2).run(cases.train_case, stage=stage, family=family, relora=relora)[0]
    _compare(result, reference_losses("rotate", family), 2e-6)


def test_replicated_bases_at_stage_3():
    relora = cases.one_sided_config(frozen_placement="replicated")
    _compare(ranks(2).run(cases.train_case, stage=3, relora=relora)[0], reference_losses("rotate"), 1e-6)

"""Weights that their owners update from whole gradients, as in plain PyTorch, at every ZeRO stage."""

import functools

import pytest

from tests.parity import owner
from tests.ranks import ranks

TOLERANCE = 1e-5
expected = functools.cache(owner.reference)


def check(results: list[dict], plain: dict, of_weights: float = 1e-4) -> None:
    result = results[0]
    for other in results:
        assert other["losses"] == result["losses"] and other["norms"] == result["norms"]
    assert min(result["norms"]) < owner.CLIP < max(result["norms"]), "clipping should act in some steps, not in all"
    worst = max(abs(a - b) / abs(b) for a, b in zip(result["losses"], plain["losses"], strict=True))
    assert worst <= TOLERANCE, f"losses differ by {worst:.2e}"
    for name, weight in plain["weights"].items():
        assert (result["weights"][name] - weight).norm() <= of_weights * weight.norm(), name


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", owner.OPTIMIZERS)
def test_losses_and_weights_equal_plain_pytorch(name, stage, accumulation):
    check(ranks(2).run(owner.train_case, stage, name, accumulation=accumulation), expected(name))


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_row_of_the_padding_has_no_gradient(stage):
    name, padding = "scale, all matrices", {"pad_token_id": 3}
    results = ranks(2).run(owner.train_case, stage, name, **padding)
    check(results, owner.reference(name, **padding))
    row = results[0]["weights"]["model.embed_tokens.weight"][3]
    assert row.count_nonzero() == 0, "it begins with zeros, and stays"


def test_one_rank_alone():
    check(ranks(1).run(owner.train_case, 1, "fira"), expected("fira"))


@pytest.mark.parametrize(
    ("stage", "name", "zero"),
    [
        (3, "scale, all matrices", {"offload_param": {"device": "cpu"}}),
        pytest.param(3, "fira", {}, marks=pytest.mark.slow),
        pytest.param(1, "muon", {}, marks=pytest.mark.slow),
    ],
)
def test_what_deepspeed_has_on_the_host(stage, name, zero):
    """Its optimizer, and parameters; those that owners update as well."""
    check(ranks(2).run(owner.train_case, stage, name, offload=True, zero=zero), expected(name))


@pytest.mark.parametrize(("stage", "family"), [(2, "gpt2"), pytest.param(3, "gpt2", marks=pytest.mark.slow)])
def test_weights_that_are_stored_transposed(stage, family):
    check(ranks(2).run(owner.train_case, stage, "apollo", family=family), expected("apollo", family))


@pytest.mark.parametrize("accumulation", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("stage", "name"), [(1, "muon"), (3, "fira"), pytest.param(0, "apollo", marks=pytest.mark.slow)]
)
def test_experts_of_which_not_every_rank_uses_each(stage, name, accumulation):
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}  # else weights this small stay gathered
    how = {"family": "mixtral", "accumulation": accumulation, "zero": zero}
    results = ranks(2).run(owner.train_case, stage, name, **how)
    check(results, expected(name, "mixtral"), of_weights=1e-3)

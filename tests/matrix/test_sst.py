"""SST as a rule of W equals the paper's factors trained by autograd, and keeps what it promises."""

import io
import re
from unittest import mock

import pytest
import torch

from relora_ds.matrix import spectral
from relora_ds.matrix.sst_update import SST
from tests.matrix.rules import SHAPES, random, same
from tests.matrix.spectral_linear import SpectralLinear
from tests.vectors import vectors

CASE = vectors("sst/vectors")
FACTORS = CASE["U"], CASE["S"], CASE["V"]
SAMPLED = torch.tensor([0, 2])


def trained(rule, weight, gradients, lr=0.01, state=None, key="a weight"):
    """W after every step, and the state."""
    state = rule.begin(weight.shape, dtype=weight.dtype) if state is None else state
    weights = []
    for gradient in gradients:
        weight = weight + rule.update(gradient, state, lr, key, weight)
        weights.append(weight)
    return torch.stack(weights), state


# -- vectors ---------------------------------------------------------------------------------------------------------


def test_a_decomposition_and_its_signs():
    for ours, theirs in zip(spectral.decompose(CASE["W0"]), FACTORS, strict=True):
        same(ours, theirs)


def test_probabilities():
    same(spectral.probabilities(CASE["S"]), CASE["p"])


def test_gradients():
    gradient = (CASE["X"] @ CASE["W0"].t() - CASE["Y"]).t() @ CASE["X"] / len(CASE["X"])
    same(gradient, CASE["G"])
    left, right, sigma = spectral.enhanced_gradients(gradient, CASE["U"], CASE["V"], SAMPLED)
    same(left, CASE["grad_U_enhanced"])
    same(right, CASE["grad_V_enhanced"])
    same(sigma, CASE["grad_S"])
    same(left * CASE["S"][SAMPLED], CASE["grad_U_default"])
    same(right * CASE["S"][SAMPLED], CASE["grad_V_default"])


def test_one_step():
    rule = SST(2, iteration_warmup_steps=0)
    with mock.patch.object(spectral, "sample", return_value=SAMPLED):
        weights, state = trained(rule, CASE["W0"], [CASE["G"]], CASE["lr"])
    same(weights[0], CASE["W_after"])
    for name, of_case in (("left", "U_after"), ("sigma", "S_after"), ("right", "V_after")):
        same(state[name], CASE[of_case])
    same(spectral.decompose(weights[0])[1], CASE["S_resvd"])


def test_a_step_costs_a_hundredth_of_orthogonality_and_a_decomposition_nothing_of_w():
    cross = CASE["U_after"].t() @ CASE["U_after"] - torch.eye(4, dtype=torch.float64)
    assert 0.01 < cross.abs().max() < 0.03
    left, sigma, right = spectral.decompose(CASE["W_after"])
    for factor in (left, right):
        same(factor.t() @ factor, torch.eye(4, dtype=torch.float64), 3e-15)
    same(spectral.product(left, sigma, right), CASE["W_after"], 3e-15)


# -- against layers that multiply with factors ---------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 3, 4])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_rule_of_w_is_training_of_its_factors(shape, r):
    """Over iterations, decompositions, and with a last iteration of a round that samples more than are left."""
    settings = {"iteration_steps": 3, "iteration_warmup_steps": 2}
    weight, x, y = random(*shape), random(8, shape[1], seed=1), random(8, shape[0], seed=2)
    layer = SpectralLinear(weight, r, key="a weight", **settings)
    rule = SST(r, **settings)
    state = rule.begin(shape, dtype=torch.float64)
    for _ in range(3 * 3 * -(-min(shape) // r) + 2):
        layer.begin_step()
        (layer(x) - y).square().mean().backward()
        layer.step(0.01)
        plain = weight.clone().requires_grad_()
        (x @ plain.t() - y).square().mean().backward()
        weight = weight + rule.update(plain.grad, state, 0.01, "a weight", weight)
        same(weight, layer.weight())
    assert state["sigma"].min() > 0.001, "of a triplet without a size, U and V have signs by chance"
    assert (weight - random(*shape)).norm() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_with_all_triplets_none_are_drawn(shape):
    """Whatever the key: Adam of all columns."""
    gradients = random(8, *shape, seed=1)
    one, state = trained(SST(99, iteration_steps=3), random(*shape), gradients, key="one")
    other, _ = trained(SST(min(shape), iteration_steps=3), random(*shape), gradients, key="other")
    assert torch.equal(one, other) and state["sampled"].tolist() == list(range(min(shape)))


# -- what is promised --------------------------------------------------------------------------------------------------


def test_sampling_is_without_replacement_and_by_probability():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = torch.stack([spectral.sample(CASE["S"], 1, f"{key}") for key in range(4000)])
    same(drawn.flatten().bincount(minlength=4) / 4000, CASE["p"].float(), 0.03)
    for key in range(20):
        found = spectral.sample(CASE["S"], 3, f"{key}")
        assert len({*found.tolist()}) == 3 and torch.equal(found, spectral.sample(CASE["S"], 3, f"{key}"))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was drawn from"
    same(spectral.probabilities(torch.zeros(4)), torch.full((4,), 0.25))


def test_sigma_ends_at_0_and_columns_keep_their_length():
    weight = 0.3 * random(6, 4)
    weights, state = trained(SST(1, iteration_steps=50), weight, [weight] * 30, lr=0.05)
    assert (state["sigma"] >= 0).all() and (state["sigma"] == 0).any()
    for name in ("left", "right"):
        same(state[name].norm(dim=0), torch.ones(4, dtype=torch.float64))
    same(weights[-1], spectral.product(state["left"], state["sigma"], state["right"]))
    columns = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    same(spectral.normalize_columns_(columns), torch.tensor([[0.6, 0.0], [0.8, 0.0]]))


def test_w_begins_as_it_is():
    for weight in (random(6, 4), torch.zeros(6, 4, dtype=torch.float64)):
        state = SST(2).begin((6, 4), dtype=torch.float64)
        assert SST(2).update(random(6, 4, seed=1), state, 0.0, "key", weight).abs().max() < 2e-14


def test_what_trains_changes_and_the_rest_stays_for_an_iteration():
    state, weight = SST(2, iteration_steps=3).begin((6, 4), dtype=torch.float64), random(6, 4)
    for number in range(2):
        rule = SST(2, iteration_steps=3)
        weights, _ = trained(rule, weight, random(1, 6, 4, seed=number), state=state)
        at, left = state["sampled"].clone(), state["left"].clone()
        others = [i for i in range(4) if i not in at.tolist()]
        weights, _ = trained(rule, weights[-1], random(2, 6, 4, seed=9), state=state)
        assert torch.equal(state["sampled"], at) and torch.equal(state["left"][:, others], left[:, others])
        assert not torch.equal(state["left"], left)
        weight = weights[-1]


def test_moments_begin_again_with_other_columns_and_those_of_sigma_with_a_decomposition():
    """Of rounds of two iterations. Moments of one gradient are `1 - decay` of it."""
    rule, gradients = SST(2, iteration_steps=3), random(7, 6, 4, seed=1)
    weight, state, kept = random(6, 4), SST(2).begin((6, 4), dtype=torch.float64), []
    for gradient in gradients:
        weights, _ = trained(rule, weight, [gradient], lr=0.0, state=state)
        weight, of = (
            weights[-1],
            spectral.enhanced_gradients(gradient, *(state[n] for n in ("left", "right", "sampled"))),
        )
        names = ("left_m", "right_m", "sigma_m")
        kept.append([bool((state[name] - 0.1 * g).abs().max() > 1e-9) for name, g in zip(names, of, strict=True)])
    new, columns_alone, old = [False] * 3, [False, False, True], [True] * 3
    assert kept == [new, old, old, columns_alone, old, old, new]


@pytest.mark.parametrize("saved_after", range(1, 14, 3))
def test_a_state_that_was_saved_and_loaded_continues_to_the_bit(saved_after):
    """Within iterations, and before a decomposition."""
    gradients, first, file = (
        random(14, 6, 4, seed=1, dtype=torch.float32),
        random(6, 4, dtype=torch.float32),
        io.BytesIO(),
    )
    expected, _ = trained(SST(2, iteration_steps=3), first, gradients)
    weights, state = trained(SST(2, iteration_steps=3), first, gradients[:saved_after])
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    weights, _ = trained(SST(2, iteration_steps=3), weights[-1], gradients[saved_after:], state=state)
    assert torch.equal(weights, expected[saved_after:])


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_weight_without_a_gradient_keeps_everything(value):
    rule, weight = SST(2, iteration_steps=3), random(6, 4)
    for steps in (0, 3, 4):
        weights, state = trained(rule, weight, [*random(steps, 6, 4, seed=1)] or [torch.zeros(6, 4)])
        before = {name: tensor.clone() for name, tensor in state.items()}
        change = rule.update(torch.full((6, 4), value), state, 0.01, "key", weights[-1])
        assert not change.any() and all(torch.equal(state[name], before[name]) for name in state)


def test_a_decomposition_that_does_not_converge_is_made_in_fp64():
    real = torch.linalg.svd

    def fails_in_fp32(matrix, **how):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError
        return real(matrix, **how)

    with mock.patch.object(torch.linalg, "svd", fails_in_fp32):
        factors = spectral.decompose(CASE["W0"].float())
    assert all(factor.dtype == torch.float32 for factor in factors)
    same(spectral.product(*factors), CASE["W0"].float(), 1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SST(0), "SST.r: 0"),
        (lambda: SST(4, iteration_steps=0), "SST.iteration_steps: 0"),
        (lambda: SST(4, iteration_warmup_steps=-1), "SST.iteration_warmup_steps: -1"),
        (lambda: SST(4, eps=0.0), "SST.eps: 0"),
        (lambda: SST(4, betas=(0.9, 1.0)), "SST.betas"),
    ],
)
def test_settings_that_are_wrong_are_named(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()

import json

import pytest
import torch
from torch import nn

from relora_ds.lowrank import reinit
from relora_ds.models.build import build_model
from tests.lab.experiments.levers.chain import Adam, Chain, Settings, dominant_rows, orthogonalized
from tests.lab.experiments.levers.network import RECIPE, Network
from tests.lab.experiments.levers.results import FILE
from tests.lab.experiments.levers.training import Pair
from tests.lab.experiments.levers.variants import VARIANTS


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_network_is_that_of_the_recipe():
    network = Network(seed=3)
    model = build_model(network.config, RECIPE.model, 3)
    for parameters in (network.parameters, dict(model.named_parameters())):
        for name, value in parameters.items():
            value.data.mul_(30 if "_proj" in name else 1)  # initial weights are too small for attention to matter
    ids = torch.randint(RECIPE.data.vocab_size, (2, RECIPE.data.seq_len), generator=generator())
    assert network.loss(ids, ids).item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_adam_is_that_of_pytorch():
    weight = nn.Parameter(torch.zeros(4, 3))
    ours, theirs = Adam(weight.shape), torch.optim.Adam([weight], lr=0.1)
    expected = torch.zeros(4, 3)
    for gradient in torch.randn(5, 4, 3, generator=generator()):
        weight.grad = gradient
        theirs.step()
        expected -= 0.1 * ours.update(gradient)
    assert torch.allclose(weight.detach(), expected, atol=1e-6)


def test_the_basis_is_that_of_the_product():
    matrix = torch.randn(9, 6, generator=generator())
    assert torch.allclose(dominant_rows(matrix, 3), reinit.dominant_rows(matrix, 3), atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_singular_values_become_about_one(shape):
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape, generator=generator())))
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("alternates", [False, True])
def test_a_chain_moves_within_its_basis_and_the_residual_outside(alternates):
    weight, gradients = torch.zeros(5, 4), torch.randn(4, 5, 4, generator=generator())
    chain = Chain(weight, Settings(r=2, residual_every=3, residual_lr=1.0, alternates=alternates), generator())
    chain.restart(gradients[0], 2)
    chain.restart(gradients[1], 2)
    assert chain.left == alternates
    basis = chain.basis.clone()

    def outside() -> torch.Tensor:
        moved = weight.T if alternates else weight
        return moved - moved @ basis.T @ basis

    for gradient in gradients[:2]:
        chain.step(gradient, 0.1, 1.0, False)
        assert weight.abs().max() > 0 and outside().abs().max() < 1e-6
    before = weight.clone()
    chain.step(gradients[2], 0.0, 1.0, False)  # so that the residual alone moves it
    inside = ((weight - before).T if alternates else weight - before) @ basis.T
    assert outside().abs().max() > 0.01 and inside.abs().max() < 1e-3 and not chain.residual.any()


def test_both_factors_go_on_where_the_chain_is():
    weight = torch.randn(5, 4, generator=generator())
    before, gradient = weight.clone(), torch.randn(5, 4, generator=generator())
    chain = Chain(weight, Settings(r=2), generator())
    chain.restart(gradient, 2)
    pair = Pair(chain)
    pair.step(gradient, 1.0, 0.5)
    values = torch.linalg.svdvals(weight - before)
    assert values[1] > 0 and values[2] < 1e-5 * values[0]


def test_what_was_measured_is_a_variant():
    found = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    assert {line["variant"] for line in found} <= set(VARIANTS)
    assert len({(line["variant"], line["seed"]) for line in found}) == len(found)

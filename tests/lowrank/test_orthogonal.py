"""Orthogonalised gradients in fp64 against the singular value decomposition, which they never make."""

import math

import pytest
import torch

from relora_ds.lowrank.orthogonal import orthogonal_update, orthogonalized

SHAPES = [(12, 12), (12, 30), (30, 12), (3, 12, 30), (3, 30, 12)]


def gradient(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The same polynomial, five times, of each singular value by itself."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(64, 64), (172, 64), (2, 64, 172)])
def test_products_in_bf16_give_nearly_the_same(shape):
    exact, matrices = orthogonalized(gradient(shape).float()), gradient(shape).float()
    found = orthogonalized(matrices, torch.bfloat16)
    assert found.dtype == torch.float32 and found.shape == matrices.shape
    assert 1e-3 < torch.linalg.norm(found - exact) / torch.linalg.norm(exact) < 0.05
    assert torch.linalg.svdvals(found).max() < 1.21


@pytest.mark.parametrize("shape", SHAPES)
def test_every_singular_value_goes_through_the_polynomial(shape):
    matrices = gradient(shape)
    expected = torch.stack([by_singular_values(matrix) for matrix in matrices.reshape(-1, *shape[-2:])]).view(shape)
    torch.testing.assert_close(orthogonalized(matrices), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_1(shape):
    left, _, right = torch.linalg.svd(gradient(shape), full_matrices=False)
    spread = torch.linspace(0.1, 1, 12, dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalized(left * spread @ right))
    assert values.min() > 0.67 and values.max() < 1.21


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e9])
def test_a_factor_changes_nothing(factor):
    once = gradient((12, 30))
    torch.testing.assert_close(orthogonalized(factor * once), orthogonalized(once), rtol=1e-9, atol=1e-9)


def test_a_transposed_gradient_gives_the_transposed_result():
    once = gradient((12, 30))
    torch.testing.assert_close(orthogonalized(once.mT), orthogonalized(once).mT, rtol=1e-10, atol=1e-10)


def test_experts_do_not_know_of_each_other():
    stack = gradient((3, 12, 30)) * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64).view(3, 1, 1)
    for one, of_stack in zip(stack, orthogonalized(stack), strict=True):
        torch.testing.assert_close(of_stack, orthogonalized(one), rtol=1e-10, atol=1e-10)


def test_nothing_comes_of_nothing():
    """An expert that no token came to has a gradient of 0."""
    stack = gradient((2, 12, 30))
    stack[0] = 0
    assert not orthogonalized(stack)[0].any() and orthogonalized(stack).isfinite().all()


@pytest.mark.parametrize("size", [1e-21, 1e-24, 1e-38])
def test_a_gradient_whose_squares_are_0_in_fp32_is_not_blown_up(size):
    update = orthogonalized((size * gradient((12, 30))).float())
    assert update.isfinite().all() and torch.linalg.matrix_norm(update, 2) < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_goes_down_and_tall_weights_take_longer_ones(shape):
    G = gradient(shape)
    update = orthogonal_update(G, 0.02)
    length = 0.02 * math.sqrt(max(1, shape[-2] / shape[-1]))
    torch.testing.assert_close(update, -length * orthogonalized(G))
    assert ((update * G).sum(dim=(-2, -1)) < 0).all()


def test_the_gradient_stays_as_it_is():
    G = gradient((12, 30))
    orthogonal_update(G, 0.02)
    assert torch.equal(G, gradient((12, 30)))

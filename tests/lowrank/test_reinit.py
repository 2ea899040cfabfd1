"""What A becomes at a restart, beside Kaiming noise: a random basis, or the gradient's dominant rows."""

import pytest
import torch

from relora_ds.lowrank.linear import ReLoRALinear, initial_A
from relora_ds.lowrank.reinit import (
    OVERSAMPLED,
    ROW_NORM,
    GradientSketch,
    dominant_rows,
    random_basis,
    warm_rows,
)


def basis(key: str = "q", r: int = 4, in_features: int = 18) -> torch.Tensor:
    return random_basis(torch.Size((r, in_features)), key)


def test_a_random_basis_is_orthonormal():
    torch.testing.assert_close(basis() @ basis().t(), torch.eye(4), atol=1e-5, rtol=0)
    assert basis(r=18).shape == (18, 18)  # r as wide as the layer
    experts = random_basis(torch.Size((3, 4, 18)), "q")
    torch.testing.assert_close(experts @ experts.mT, torch.eye(4).expand(3, 4, 4), atol=1e-5, rtol=0)


def test_a_random_basis_is_known_by_its_key():
    assert torch.equal(basis(), basis())
    assert not torch.allclose(basis(), basis("k"), atol=0.01)


def test_rows_are_as_long_as_kaimings():
    kaiming = initial_A(500, 1000, seed=0, restart=1, name="q").norm(dim=1).mean()
    assert kaiming == pytest.approx(ROW_NORM, rel=0.01)


def layer_and_batch(dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(30, 50, dtype=dtype))
    layer = ReLoRALinear(50, 30, weight, None, r=4, lora_alpha=4, dtype=dtype)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    # Inputs along few directions: a gradient with dominant rows.
    return layer, (torch.randn(64, 6) @ torch.randn(6, 50) + 0.01 * torch.randn(64, 50)).to(dtype)


def captured(A: torch.Tensor, gradient: torch.Tensor) -> float:
    """The share of the gradient's energy that lies in A's row space."""
    basis = torch.linalg.qr(A.t()).Q
    return ((gradient @ basis).square().sum() / gradient.square().sum()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sketch_finds_the_gradients_dominant_rows(dtype):
    layer, x = layer_and_batch(dtype)
    layer.sketch = GradientSketch(4, 50, "key")
    for half in x.chunk(2):  # micro-batches add up
        layer(half).square().sum().backward()
    assert layer.sketch.values.shape == (4 + OVERSAMPLED, 50) and layer.sketch.values.dtype == torch.float32
    merged = layer.merged_weight().requires_grad_()
    (x.float() @ merged.t()).square().sum().backward()
    gradient = merged.grad
    found = dominant_rows(layer.sketch.values, 4)
    best = torch.linalg.svd(gradient).Vh[:4]
    assert captured(found, gradient) >= 0.9 * captured(best, gradient)
    assert captured(found, gradient) > 2 * captured(initial_A(4, 50, seed=0, restart=1, name="q"), gradient)
    torch.testing.assert_close(found @ found.t(), torch.eye(4), atol=1e-5, rtol=0)


def test_a_warm_sketch_finds_more_from_step_to_step():
    """Along the directions that the moment knows, a sketch is a step of subspace iteration."""
    torch.manual_seed(0)
    gradient = torch.linalg.qr(torch.randn(60, 60)).Q * torch.arange(1, 61) ** -0.5
    gradient = gradient @ torch.linalg.qr(torch.randn(60, 60)).Q
    best = captured(torch.linalg.svd(gradient).Vh[:8], gradient)
    A, seen = basis(r=8, in_features=60), []
    for step in range(3):
        omega = warm_rows(gradient @ A.t(), str(step))  # the moment of a chain whose gradient stays
        assert omega.shape == (8 + OVERSAMPLED, 60)
        A = dominant_rows(omega @ gradient, 8)
        seen.append(captured(A, gradient) / best)
    assert seen[0] < seen[1] < seen[2] and seen[2] > 0.9


def test_the_largest_entry_of_each_row_is_positive():
    torch.manual_seed(0)
    gradient = torch.randn(30, 20)
    A = dominant_rows(gradient, 5)
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(dominant_rows(-gradient, 5), A)


def test_a_sketch_changes_no_gradient():
    layer, x = layer_and_batch()
    gradients = []
    for sketch in (None, GradientSketch(4, 50, "key")):
        layer.sketch = sketch
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append((layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_to_choose_from():
    assert dominant_rows(torch.zeros(12, 50), 4) is None
    assert dominant_rows(torch.full((12, 50), float("nan")), 4) is None

"""What A becomes at a restart, beside Kaiming noise: orthogonal to earlier cycles, or the gradient's dominant rows."""

import pytest
import torch

from relora_ds.lowrank.linear import ReLoRALinear, initial_A
from relora_ds.lowrank.reinit import OVERSAMPLED, ROW_NORM, GradientSketch, dominant_rows, orthogonal_A


def cycle(number: int, r: int = 4, in_features: int = 18, **other) -> torch.Tensor:
    return orthogonal_A(r, in_features, **{"seed": 0, "restart": number, "name": "q", **other})


def test_cycles_begin_in_orthogonal_subspaces_until_the_space_is_full():
    together = torch.cat([cycle(number) for number in range(4)])  # 16 of 18 dimensions
    torch.testing.assert_close(together @ together.t() / ROW_NORM**2, torch.eye(16), atol=1e-5, rtol=0)
    again = torch.cat([cycle(number) for number in range(4, 8)])
    torch.testing.assert_close(again @ again.t() / ROW_NORM**2, torch.eye(16), atol=1e-5, rtol=0)
    assert not torch.allclose(again, together, atol=0.01)  # another matrix


def test_orthogonal_rows_depend_on_seed_cycle_and_name():
    assert torch.equal(cycle(1), cycle(1))
    assert all(not torch.equal(cycle(1), other) for other in (cycle(2), cycle(1, seed=1), cycle(1, name="k")))
    assert cycle(3, r=18).shape == (18, 18)  # r as wide as the layer: every cycle has a matrix of its own


def test_rows_are_as_long_as_kaimings():
    kaiming = initial_A(500, 1000, seed=0, restart=1, name="q").norm(dim=1).mean()
    assert kaiming == pytest.approx(ROW_NORM, rel=0.01)
    assert cycle(1).norm(dim=1).tolist() == pytest.approx([ROW_NORM] * 4, rel=1e-5)


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
    torch.testing.assert_close(found @ found.t(), torch.eye(4) * ROW_NORM**2, atol=1e-5, rtol=0)


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

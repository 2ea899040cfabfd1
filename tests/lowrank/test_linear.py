"""The fused layer against the formula, in value and gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.lowrank.kernels import lowrank_linear
from relora_ds.lowrank.linear import ReLoRALinear, initial_A


def _factors(dtype, base=True, bias=True):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 5, dtype=dtype) if base else None
    lora_A = torch.randn(2, 5, dtype=dtype, requires_grad=True)
    lora_B = torch.randn(7, 2, dtype=dtype, requires_grad=True)
    b = torch.randn(7, dtype=dtype, requires_grad=True) if bias else None
    return x, weight, lora_A, lora_B, b


def _formula(x, weight, lora_A, lora_B, bias, scaling):
    y = scaling * (x @ lora_A.t()) @ lora_B.t()
    if weight is not None:
        y = y + x @ weight.t()
    return y if bias is None else y + bias


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_layer_equals_the_formula_and_its_gradients(base, bias):
    x, weight, lora_A, lora_B, b = _factors(torch.float64, base, bias)
    leaves = [t for t in (x, lora_A, lora_B, b) if t is not None]
    ours, formula = lowrank_linear(x, weight, lora_A, lora_B, b, 0.7), _formula(x, weight, lora_A, lora_B, b, 0.7)
    torch.testing.assert_close(ours, formula)
    upstream = torch.randn_like(ours)
    for got, want in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(formula, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(
        lambda *a: lowrank_linear(a[0], weight, a[1], a[2], a[3] if bias else None, 0.7), leaves
    )


def test_only_x_and_h_are_kept_for_backward():
    x, weight, lora_A, lora_B, b = _factors(torch.float32)
    y = lowrank_linear(x, weight, lora_A, lora_B, b, 0.7)
    parameters = {t.data_ptr() for t in (weight, lora_A, lora_B)}
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.data_ptr() not in parameters]
    assert sorted(tuple(t.shape) for t in kept) == [(6, 2), (6, 5)]


def _layer(dropout=0.0):
    linear = nn.Linear(5, 7)
    layer = ReLoRALinear(5, 7, linear.weight, linear.bias, r=2, lora_alpha=4, lora_dropout=dropout)
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    return layer


def test_layer_trains_factors_and_bias_and_freezes_the_weight():
    layer = _layer()
    layer(torch.randn(3, 5)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B", "bias"}
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}


def test_dropout_acts_on_the_low_rank_branch_only_and_not_in_eval():
    layer, x = _layer(dropout=0.5), torch.randn(3, 5)
    fused = lowrank_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.scaling)
    assert not torch.allclose(layer(x), fused)
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    h = F.dropout(x, 0.5) @ layer.lora_A.t()
    torch.testing.assert_close(dropped, F.linear(x, layer.weight, layer.bias) + 2.0 * h @ layer.lora_B.t())
    torch.testing.assert_close(layer.eval()(x), fused)


def test_merged_weight_is_the_function_of_the_layer():
    layer, x = _layer(), torch.randn(3, 5)
    torch.testing.assert_close(F.linear(x, layer.merged_weight(), layer.bias), layer(x))


def test_initial_A_depends_on_seed_restart_and_name_and_on_nothing_else():
    torch.manual_seed(1)
    first = initial_A(4, 9, seed=0, restart=1, name="q")
    torch.manual_seed(2)
    assert torch.equal(first, initial_A(4, 9, seed=0, restart=1, name="q"))
    for change in (dict(seed=1), dict(restart=2), dict(name="k")):
        other = {**dict(seed=0, restart=1, name="q"), **change}
        assert not torch.equal(first, initial_A(4, 9, **other))
    bound = 1 / 9**0.5  # kaiming_uniform with a=√5: U(-1/√in, 1/√in)
    assert first.abs().max() <= bound and first.abs().max() > 0.7 * bound

"""The fused function over a weight of every format: values and gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.lowrank import kernels
from relora_ds.lowrank.formats import DENSE, format_named
from relora_ds.lowrank.kernels import lowrank_linear
from relora_ds.lowrank.linear import ReLoRALinear

PACKED = ["fp32", "bf16", "fp16", "int8", "fp8", "fp8_both_layouts", "nf4", "nf4_double"]
FORMATS = ["dense", *PACKED]
IN, OUT, R = 40, 48, 4  # sides that are no multiples of nf4's blocks
RHO = 0.93


def _stored(name, dtype, seed=0):
    """A stored weight, and what it stands for in fp64."""
    value = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    format = format_named(name)
    stored = format.quantize(value, dtype)
    if name == "dense":
        return stored, stored.double()
    return stored, format.dequantize(stored, value.shape, torch.float32).double()


def _leaves(dtype, rows=(2, 3), bias=True):
    torch.manual_seed(1)
    shapes = [(*rows, IN), (R, IN), (OUT, R), *([(OUT,)] if bias else [])]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def _three_matmuls(weight, x, lora_A, lora_B, bias=None):
    y = x @ weight.t() + 0.7 * (x @ lora_A.t()) @ lora_B.t()
    return y if bias is None else y + bias


def _fused(name, stored, x, lora_A, lora_B, bias=None, **how):
    return lowrank_linear(x, stored, lora_A, lora_B, bias, 0.7, format_named(name), **how)


both_products = pytest.mark.parametrize("folded", [False, True], ids=["separate", "folded"])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in FORMATS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if (name, dtype) != ("fp8_both_layouts", torch.bfloat16)
    ],
)  # may multiply in fp8, see test_formats.py
@pytest.mark.parametrize("bias, rho", [(True, None), (False, None), (True, RHO)])
@both_products
def test_values_and_gradients_are_those_of_three_matmuls_with_the_dequantized_weight(name, bias, dtype, rho, folded):
    stored, weight = _stored(name, dtype)
    leaves = _leaves(dtype, bias=bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = _fused(name, stored, *leaves, decay=None if rho is None else torch.tensor(rho), folded=folded)
    want = _three_matmuls(weight * (rho or 1), *exact)
    upstream = torch.randn(y.shape).to(dtype)
    gradients = torch.autograd.grad(y, leaves, upstream)
    wanted = torch.autograd.grad(want, exact, upstream.double())
    for got, true in zip((y, *gradients), (want, *wanted), strict=True):
        assert got.dtype == dtype and got.shape == true.shape
        # W, h and s·g·B are rounded to dtype, and so is each result.
        assert (got - true).norm() <= 3 * torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("nf4")])  # bitsandbytes has no fp64
@pytest.mark.parametrize("bias, rho", [(True, None), (False, RHO)])
@both_products
def test_gradcheck(name, bias, rho, folded):
    stored, _ = _stored(name, torch.float64)
    how = {"decay": None if rho is None else torch.tensor(rho), "folded": folded}
    leaves = _leaves(torch.float64, rows=(2,), bias=bias)
    assert torch.autograd.gradcheck(lambda *leaves: _fused(name, stored, *leaves, **how), leaves, fast_mode=True)


@pytest.mark.parametrize("rho", [None, RHO])
@pytest.mark.parametrize("name", ["dense", "transposed_dense"])
def test_a_folded_product_is_the_separate_one_in_other_words(name, rho):
    leaves = _leaves(torch.float64)
    weight = torch.randn((IN, OUT) if name != "dense" else (OUT, IN), dtype=torch.float64)
    decay = None if rho is None else torch.tensor(rho, dtype=torch.float64)
    results = []
    for folded in (False, True):
        before = weight.clone()
        y = _fused(name, weight, *leaves, decay=decay, folded=folded)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        assert torch.equal(weight, before)
    for separate, other in zip(*results, strict=True):
        torch.testing.assert_close(other, separate, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(_fused(name, weight, *leaves, decay=decay, folded=True), results[0][0])


@both_products
@pytest.mark.parametrize("name", ["dense", "int8", "nf4"])
def test_decay_is_finer_than_16_bit(name, folded):
    rho = 0.998  # bf16 has 0.996 and 1, and x·0.998 is x for every number of bf16
    stored, weight = _stored(name, torch.bfloat16)
    leaves = _leaves(torch.bfloat16, rows=(400,), bias=False)
    leaves[2].data.mul_(0.1)
    y = _fused(name, stored, *leaves, decay=torch.tensor(rho), folded=folded).detach()
    update = 0.7 * leaves[0].double() @ leaves[1].double().t() @ leaves[2].double().t()
    want = (leaves[0].double() @ weight.t()).detach()
    found = ((y - update) * want).sum() / want.square().sum()  # of 19,200 numbers, each rounded
    assert found.item() == pytest.approx(rho, abs=3e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_second_derivative_is_refused_not_wrong(dropout):
    layer, x = _layer("int8", dropout=dropout)[0], torch.randn(5, IN, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1,), (2, 3, 4)])
@pytest.mark.parametrize("name", FORMATS)
@both_products
def test_any_number_of_rows(name, shape, folded):
    stored, weight = _stored(name, torch.float32)
    leaves = _leaves(torch.float32, rows=shape)
    y = _fused(name, stored, *leaves, folded=folded)
    want = _three_matmuls(weight.float(), *leaves)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    for got, true in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(got, true, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@both_products
def test_inputs_and_gradients_that_are_not_contiguous(name, folded):
    stored, weight = _stored(name, torch.float32)
    _, lora_A, lora_B, bias = _leaves(torch.float32)
    wide = torch.randn(IN, 3, 2, requires_grad=True)
    factors = (torch.randn(IN, R).t().requires_grad_(), torch.randn(R, OUT).t().requires_grad_())
    for x in (wide.permute(2, 1, 0), wide[:, :1].permute(2, 1, 0).expand(2, 5, IN)):
        y = _fused(name, stored, x, *factors, bias, folded=folded)
        want = _three_matmuls(weight.float(), x, *factors, bias)
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
        for upstream in (torch.randn(OUT, *y.shape[1::-1]).permute(2, 1, 0), torch.ones(()).expand(y.shape)):
            got = torch.autograd.grad(y, (wide, *factors, bias), upstream, retain_graph=True)
            true = torch.autograd.grad(want, (wide, *factors, bias), upstream, retain_graph=True)
            for a, b in zip(got, true, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FORMATS)
@both_products
def test_what_is_not_finite_stays_visible(name, bad, folded):
    stored, _ = _stored(name, torch.float32)
    leaves = _leaves(torch.float32, rows=(3,))
    with torch.no_grad():
        leaves[0][1, 2] = bad
    y = _fused(name, stored, *leaves, folded=folded)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()
    upstream = torch.ones_like(y)
    upstream[2, 3] = bad
    (grad,) = torch.autograd.grad(y, leaves[:1], upstream)
    assert not grad[2].isfinite().any() and grad[:2].isfinite().all()


def _layer(name, *, dropout=0.0, bias=True, base=True, dtype=torch.float32):
    stored, weight = _stored(name, dtype)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = ReLoRALinear(
        IN,
        OUT,
        nn.Parameter(weight.to(dtype)) if base else None,
        linear.bias,
        r=R,
        lora_alpha=2 * R,
        lora_dropout=dropout,
        dtype=dtype,
    )
    if base and name != "dense":
        layer.store_weight(stored, format_named(name), as_buffer=False)
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    return layer, weight.to(dtype)


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_dropout_stands_on_the_low_rank_branch_of_every_format(name, bias, base):
    layer, weight = _layer(name, dropout=0.5, bias=bias, base=base)
    leaves = [torch.randn(5, IN, requires_grad=True), *layer.parameters()]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]

    def formula(x):
        y = layer.scaling * F.dropout(x, 0.5) @ layer.lora_A.t() @ layer.lora_B.t()
        y = y + x @ weight.t() if base else y
        return y + layer.bias if bias else y

    results = []
    for function in (layer, formula):
        torch.manual_seed(3)
        y = function(leaves[0])
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_merged_weight_of_every_format(name):
    layer, weight = _layer(name)
    merged = layer.merged_weight()
    torch.testing.assert_close(merged, weight + 2.0 * layer.lora_B @ layer.lora_A)
    assert merged.data_ptr() != layer.weight.data_ptr()


def test_fake_operators_agree_with_the_real_ones():
    from torch.library import opcheck

    stored, _ = _stored("int8", torch.float32)
    x, lora_A, lora_B, bias = (leaf.detach() for leaf in _leaves(torch.float32, rows=(6,)))
    g, h = torch.randn(6, OUT), torch.randn(6, R)
    utils = ("test_schema", "test_faketensor")
    opcheck(torch.ops.relora_ds.product, (x, lora_A.t()), test_utils=utils)
    opcheck(torch.ops.relora_ds.product, (g.t(), h), test_utils=utils)
    for weight, low in ((stored, h), (stored, None), (None, h)):
        for b in (bias, None):
            opcheck(torch.ops.relora_ds.linear, (x, weight, low, lora_B, b, 0.7, "int8"), test_utils=utils)
        opcheck(torch.ops.relora_ds.linear_input_grad, (g, weight, low, lora_A, "int8"), test_utils=utils)
    for decay in (None, torch.tensor(RHO)):
        folded = (x, stored, None, lora_B, bias, 0.7, "int8", None, lora_A, decay)
        opcheck(torch.ops.relora_ds.linear, folded, test_utils=utils)
        folded = (g, stored, None, lora_A, "int8", lora_B, 0.7, decay)
        opcheck(torch.ops.relora_ds.linear_input_grad, folded, test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_16_bit_products_are_made_in_fp32_and_rounded_once(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "SLOW_ON_CPU", {dtype})
    weight = torch.randn(OUT, IN).to(dtype)
    x, lora_A, lora_B, bias = (leaf.detach() for leaf in _leaves(dtype, rows=(6,)))
    h = torch.ops.relora_ds.product(x, lora_A.t())
    assert torch.equal(h, (x.float() @ lora_A.float().t()).to(dtype))
    y = torch.ops.relora_ds.linear(x, weight, h, lora_B, bias, 0.5, DENSE.name)
    want = x.float() @ weight.float().t() + 0.5 * h.float() @ lora_B.float().t() + bias.float()
    assert y.dtype == dtype and (y - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()
    y = torch.ops.relora_ds.linear(x, weight, None, lora_B, bias, 0.5, DENSE.name, None, lora_A)
    dense = weight.float() + 0.5 * lora_B.float() @ lora_A.float()
    torch.testing.assert_close(y, (x.float() @ dense.t() + bias.float()).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)

    def dtypes(*tensors):
        seen.extend(t.dtype for t in tensors if isinstance(t, torch.Tensor))
        return tensors[0].float()

    seen, codes = [], torch.zeros(3, dtype=torch.uint8)
    widened = kernels._in_fp32_where_16_bit_is_slow(dtypes)
    assert widened(x, None, codes, lora_A, 0.5, "int8").dtype == dtype
    assert seen == [torch.float32, torch.uint8, torch.float32]
    monkeypatch.setattr(kernels, "SLOW_ON_CPU", set())
    widened(x, codes, lora_A)
    assert seen[3:] == [dtype, torch.uint8, dtype]

"""How frozen weights are stored: what rounding costs, the bytes, odd weights, and products in fp8."""

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from relora_ds.lowrank import fp8, kernels, nf4
from relora_ds.lowrank.base_format import Packed, scaled
from relora_ds.lowrank.formats import DENSE, format_named, format_of
from relora_ds.lowrank.fp8 import FP8, multiplies_fp8
from relora_ds.lowrank.linear import ReLoRALinear
from tests.emulated_cuda.rules import check_scaled_mm

PACKED = ["fp32", "bf16", "fp16", "int8", "fp8", "fp8_both_layouts", "nf4", "nf4_double"]
# Half the largest gap between neighbouring codes, relative to the largest magnitude that shares the scale; nf4's scales
# cost nf4_double a little more.
LARGEST_ERROR = {"int8": 0.5 / 127, "fp8": 16 / 448, "fp8_both_layouts": 16 / 448, "nf4": 0.152, "nf4_double": 0.16}


def _weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def _round_trip(name, value, dtype=torch.float32):
    format = format_named(name)
    return format.dequantize(format.quantize(value, torch.float32), value.shape, dtype)


@pytest.mark.parametrize("shape", [(64, 48), (7, 64), (32, 10), (128, 33), (1, 64)])
@pytest.mark.parametrize("name", LARGEST_ERROR)
def test_no_value_is_off_by_more_than_half_a_gap_of_the_codes(name, shape):
    value = _weight(*shape)
    if name != "nf4_double":  # whose 8-bit scales are of about one magnitude
        value[0] *= 100
    groups = (64, -1) if name.startswith("nf4") else (shape[1], -1)
    error = (_round_trip(name, value) - value).reshape(-1, groups[0]).abs()
    largest = value.reshape(-1, groups[0]).abs().amax(dim=1, keepdim=True)
    assert (error <= 1.0001 * LARGEST_ERROR[name] * largest).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_cast_rounds_to_nearest(name, dtype):
    value = _weight(5, 7)
    assert torch.equal(_round_trip(name, value), value.to(dtype).float())
    assert format_named(name).floating_dtype(torch.float32) == dtype
    assert torch.equal(DENSE.quantize(value, dtype), value.to(dtype))
    assert DENSE.quantize(value, torch.float32).data_ptr() != value.data_ptr()  # the master and the copy are two


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("fp32", 4 * 128 * 96),
        ("bf16", 2 * 128 * 96),
        ("int8", 128 * 96 + 4 * 128),
        ("fp8", 128 * 96 + 4 * 128),
        ("fp8_both_layouts", 2 * 128 * 96 + 4 * 128),
        ("nf4", 128 * 96 // 2 + 4 * 128 * 96 // 64),
        (
            "nf4_double",
            128 * 96 // 2 + 128 * 96 // 64 + 16 + 16,
        ),  # one scale of 192 scales, and their mean, each aligned
    ],
)
def test_a_packed_weight_is_one_flat_tensor_of_so_many_bytes(name, num_bytes):
    format, value = format_named(name), _weight(128, 96)
    stored = format.quantize(value, torch.float32)
    like = format.stored_like(value.shape, torch.float32, "meta")
    assert (stored.dtype, stored.shape) == (torch.uint8, (num_bytes,)) == (like.dtype, like.shape)
    assert format.num_bytes(value.shape) == num_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PACKED)
def test_a_dequantized_weight_is_rounded_once(name, dtype):
    value = _weight(64, 48)
    assert torch.equal(_round_trip(name, value, dtype), _round_trip(name, value).to(dtype))


@pytest.mark.parametrize("name", PACKED)
def test_equal_weights_have_equal_bytes_however_they_lie_in_memory(name):
    format, value = format_named(name), _weight(64, 32)
    stored = format.quantize(value, torch.float32)
    assert torch.equal(stored, format.quantize(value.t().contiguous().t(), torch.float32))
    assert torch.equal(stored, format.quantize(torch.cat([value, value], 1)[:, :32], torch.float32))


def test_a_dense_copy_is_contiguous():
    """It is broadcast, and its bytes are counted."""
    assert format_named("dense").quantize(_weight(64, 32).t(), torch.bfloat16).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_read_e4m3_agree(dtype):
    """One is for CPUs, the other for what converts e4m3 itself."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    scale = torch.rand(16, 1) + 0.01
    ours, torchs = (way(codes, scale, dtype) for way in (fp8._scaled_e4m3_bits, scaled))
    finite = torch.isfinite(codes.float())  # a stored weight has no NaN
    assert torch.equal(ours[finite], torchs[finite]) and finite.sum() == 254


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("constant", [0.0, 0.02, -1e-30, 1e-42])
def test_constant_and_tiny_weights(name, constant):
    value = torch.full((8, 64), constant)
    found = _round_trip(name, value)
    if name.startswith("fp16"):
        assert torch.equal(found, value.half().float())
    else:
        torch.testing.assert_close(found, value, rtol=4e-3, atol=1e-38)


@pytest.mark.parametrize("name", PACKED)
def test_rows_of_zeros_stay_zeros_beside_others(name):
    value = _weight(8, 64)
    value[3] = 0
    found = _round_trip(name, value)
    assert (found[3] == 0).all() and (found[2] != 0).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", PACKED)
def test_a_weight_that_is_not_finite_is_not_hidden(name, bad):
    value = _weight(8, 64)
    value[3, 5] = bad
    found = _round_trip(name, value)
    assert not found[3, 5].isfinite()
    if name != "nf4_double":  # there the mean of all scales is no number
        assert found[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_fp8_is_read_on_a_cpu_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes = codes[:, :127].contiguous().view(torch.float8_e4m3fn)  # the last of each sign is NaN
    format = FP8()
    stored = format.pack([codes, torch.tensor([[1.0], [0.3]])], codes.shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        want = (codes.float() * torch.tensor([[1.0], [0.3]])).to(dtype)
        got = format.dequantize(stored, codes.shape, dtype)
        assert torch.equal(got.float(), want.float()) and got.dtype == dtype
        assert torch.equal(got.signbit(), want.signbit())


class _Calls(TorchDispatchMode):
    def __init__(self, name):
        super().__init__()
        self.name, self.found = name, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == self.name:
            self.found.append((func, args, kwargs))
        if func.namespace == "relora_ds":  # kernels in Python: look inside
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["nf4", "nf4_double"])
def test_nf4_does_not_depend_on_where_rows_end(name):
    """bitsandbytes' AVX-512 kernel indexes scales by row: it is given rows of one block, whatever the weight's."""
    value = _weight(32, 86)  # rows of a block and a third
    with _Calls("bitsandbytes::dequantize_4bit") as calls:
        found = _round_trip(name, value)
    assert [args[4] for _, args, _ in calls.found] == [[32 * 86 // 64, 64]]
    assert torch.equal(found, _round_trip(name, value.view(-1, 64)).view(32, 86))


def test_what_cannot_be_stored_is_said(monkeypatch):
    nf4 = format_named("nf4")
    assert nf4.problem(torch.Size([33, 3])) == (
        "nf4 stores blocks of 64 weights, which do not divide its 33x3; leave it out of relora.target_modules, or use "
        "frozen_dtype=int8"
    )
    assert nf4.problem(torch.Size([32, 10])) is None
    assert all(format_named(name).problem(torch.Size([33, 3])) is None for name in PACKED if "nf4" not in name)
    assert nf4.unavailable() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert nf4.unavailable() == 'needs bitsandbytes; pip install ".[quantization]", or use frozen_dtype=int8'
    assert all(format_named(name).unavailable() is None for name in PACKED if "nf4" not in name)


def test_a_broken_library_is_said(monkeypatch):
    def broken():
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(nf4, "_bitsandbytes", broken)
    assert "cannot be imported (libcudart.so.12" in format_named("nf4").unavailable()


@pytest.mark.parametrize("capability, able", [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_which_devices_multiply_in_fp8(monkeypatch, capability, able):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplies_fp8(torch.device("cuda")) is able


def test_the_format_that_a_recipe_asks_for():
    assert format_of("auto", "bf16") is DENSE is format_of("bf16", "bf16")
    assert format_of("bf16", "fp32") is format_named("bf16")
    assert format_of("nf4", "bf16", double_quant=True).name == "nf4_double"
    assert format_of("int8", "bf16", double_quant=True).name == "int8"
    assert format_of("fp8", "bf16", in_fp8=True).name == "fp8_both_layouts"
    assert format_of("fp8", "fp16", in_fp8=True).name == "fp8" == format_of("fp8", "bf16").name
    assert not multiplies_fp8(torch.device("cpu"))


@pytest.mark.parametrize("name", PACKED)
def test_a_cast_of_the_module_leaves_the_bytes_alone(name):
    layer = ReLoRALinear(32, 64, torch.nn.Parameter(_weight(64, 32)), None, r=4, lora_alpha=4)
    stored = format_named(name).quantize(layer.weight, torch.float32)
    for as_buffer in (False, True, False):
        layer.store_weight(stored.clone(), format_named(name), as_buffer=as_buffer)
        assert ("weight" in dict(layer.named_parameters())) is not as_buffer
        assert ("weight" in layer.state_dict()) is not as_buffer
        layer.to(torch.bfloat16)
        assert layer.lora_A.dtype == torch.bfloat16 and torch.equal(layer.weight, stored)
        assert isinstance(layer.format, Packed) and not layer.weight.requires_grad


def _multiplies_on_cpu() -> bool:
    try:
        format = format_named("fp8_both_layouts")
        stored = format.quantize(torch.ones(16, 16), torch.bfloat16)
        format.multiply(torch.ones(1, 16, dtype=torch.bfloat16), stored, torch.Size([16, 16]))
    except (RuntimeError, NotImplementedError):
        return False
    return True


needs_fp8_products = pytest.mark.skipif(
    not _multiplies_on_cpu(), reason="this torch does not multiply fp8 by row on a CPU"
)


@needs_fp8_products
@pytest.mark.parametrize("rows", [0, 1, 24])
def test_products_in_fp8(rows):
    """Rounding to e4m3 costs at most 1/16 of a number, 2.6 % of many; of a sum of many independent ones, as much."""
    format, value = format_named("fp8_both_layouts"), _weight(128, 256)
    value[:64] *= 30  # the scales of the rows differ
    value[5] = 0
    stored = format.quantize(value, torch.bfloat16)
    weight = format.dequantize(stored, value.shape, torch.float64)
    torch.manual_seed(0)
    x, g = (torch.randn(rows, size).bfloat16() for size in (256, 128))
    x[1:2], g[1:2] = 0, 0  # of 24
    with _Calls("aten::_scaled_mm") as calls:
        y = format.multiply(x, stored, value.shape)
        grad = format.multiply_transposed(g, stored, value.shape)
    assert len(calls.found) == (2 if rows else 0)  # it refuses products without rows
    for got, want in ((y, x.double() @ weight.t()), (grad, g.double() @ weight)):
        assert got.dtype == torch.bfloat16 and got.shape == want.shape
        assert (got - want).norm() <= 0.04 * want.norm()
    small = x.double() @ weight[64:].t()  # each row of W has a scale of its own
    assert (y[:, 64:] - small).norm() <= 0.04 * small.norm()


def test_fp8_multiplies_dequantized_where_its_kernels_cannot():
    format, value = format_named("fp8_both_layouts"), _weight(24, 33)
    assert format.num_bytes(value.shape) == FP8().num_bytes(value.shape)  # the second layout would serve nothing
    stored = format.quantize(value, torch.bfloat16)
    weight = format.dequantize(stored, value.shape, torch.bfloat16)
    x = torch.randn(5, 33).bfloat16()
    assert torch.equal(format.multiply(x, stored, value.shape), x @ weight.t())
    square = _weight(16, 16)
    stored = format.quantize(square, torch.float32)
    with _Calls("aten::_scaled_mm") as calls:
        format.multiply(torch.ones(1, 16), stored, square.shape)  # fp32 rows stay fp32
    assert calls.found == []


LIE = {
    "by rows": lambda x: x,
    "by columns": lambda x: x.t().contiguous().t(),
    "apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "one row of many": lambda x: x[:1],
    "one row": lambda x: x.flatten().as_strided((1, x.shape[1]), (1, 1)),
}


def _layer_in_fp8(x, g) -> tuple[list, torch.Tensor, torch.Tensor]:
    """The products of a layer's forward and backward; its result and its input's gradient."""
    format, x = format_named("fp8_both_layouts"), x.detach().requires_grad_()
    A, B = (torch.zeros(size, dtype=torch.bfloat16) for size in ((4, x.shape[-1]), (g.shape[-1], 4)))
    stored = format.quantize(_weight(g.shape[-1], x.shape[-1]), torch.bfloat16)
    with _Calls("aten::_scaled_mm") as calls:
        y = kernels.lowrank_linear(x, stored, A, B, None, 1.0, format)
        y.backward(g)
    return calls.found, y, x.grad


@needs_fp8_products
@pytest.mark.parametrize("how", LIE)
def test_fp8_operands_lie_in_memory_as_cuda_wants_them(how, monkeypatch):
    """A CPU multiplies them however they lie."""
    monkeypatch.setattr(kernels, "SLOW_ON_CPU", set())
    batch = [torch.linspace(-1, 1, 24 * size).view(24, size).bfloat16() for size in (48, 64)]
    lying = [LIE[how](each) for each in batch]
    products, *results = _layer_in_fp8(*lying)
    assert [args[7:] for _, args, _ in products] == [(True,), ()]  # use_fast_accum: not for gradients
    for product in products:
        check_scaled_mm(*product)
    _, *expected = _layer_in_fp8(*(each.clone(memory_format=torch.contiguous_format) for each in lying))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


class _Wide(TorchDispatchMode):
    """The largest number of elements of an fp32 tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and not func.is_view:
            self.largest = max(self.largest, result.numel())
        return result


@needs_fp8_products
def test_fp8_makes_no_fp32_copy_of_activations_and_gradients():
    format, value = format_named("fp8_both_layouts"), _weight(64, 48)
    stored = format.quantize(value, torch.bfloat16)
    x, g = torch.randn(32, 48).bfloat16(), torch.randn(32, 64).bfloat16()
    with _Wide() as wide:
        format.multiply(x, stored, value.shape)
        format.multiply_transposed(g, stored, value.shape)
    assert 0 < wide.largest <= 64  # scales


@needs_fp8_products
@pytest.mark.parametrize("number", [0.0, 1e-38, 1e-30, 3e38])
def test_products_in_fp8_of_tiny_and_huge_numbers(number):
    format = format_named("fp8_both_layouts")
    stored = format.quantize(torch.eye(16), torch.bfloat16)
    rows = torch.full((2, 16), number).bfloat16()
    for product in (format.multiply, format.multiply_transposed):
        torch.testing.assert_close(product(rows, stored, torch.Size([16, 16])), rows, rtol=0.07, atol=1e-37)


@needs_fp8_products
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_in_fp8_do_not_hide_what_is_not_finite(bad):
    format = format_named("fp8_both_layouts")
    stored = format.quantize(_weight(16, 32), torch.bfloat16)
    x = torch.ones(3, 32).bfloat16()
    x[1, 5] = bad
    y = format.multiply(x, stored, torch.Size([16, 32]))
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()

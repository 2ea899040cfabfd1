"""A layer on a GPU computes what the formula says, in every format, precision and way."""

import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from relora_ds.lab.bench import layer as bench
from relora_ds.lowrank.formats import DTYPES, format_named
from relora_ds.lowrank.fp8 import FP8, multiplies_fp8
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.reinit import GradientSketch
from tests.cuda.gpus import needs, on_gpus
from tests.lab.bench.test_layer import tiny_arguments

IN, OUT, RANK, ROWS = 64, 32, 4, 48
FORMATS = (
    "dense",
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "fp8",
    "fp8_both_layouts",
    *(pytest.param(name, marks=needs("bitsandbytes")) for name in ("nf4", "nf4_double")),
)
# Largest error, relative to the norm: of products in the precision, and of those in fp8.
WORST = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}
WORST_IN_FP8 = 0.1


def worst_errors(format: str) -> dict[str, float]:
    """By precision: of output, gradients and merged weight, over all ways to compute."""
    found = {}
    for precision, biased, dropout, sketched in itertools.product(DTYPES, (False, True), (0.0, 0.25), (False, True)):
        values = _values(DTYPES[precision], biased)
        with mock.patch.object(F, "dropout", _same_dropout):
            ours = _ours(format, precision, values, dropout, sketched)
        formula = _formula(format, precision, values, dropout)
        error = max(_relative(got, formula[name]) for name, got in ours.items())
        found[precision] = max(error, found.get(precision, 0.0))
    return found


def _values(dtype: torch.dtype, biased: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "x": (ROWS, IN),
        "weight": (OUT, IN),
        "lora_A": (RANK, IN),
        "lora_B": (OUT, RANK),
        "upstream": (ROWS, OUT),
        **({"bias": (OUT,)} if biased else {}),
    }
    found = {name: torch.randn(*size, generator=generator) / size[-1] ** 0.5 for name, size in sizes.items()}
    return {name: value if name == "weight" else value.to(dtype) for name, value in found.items()}


def _same_dropout(x: Tensor, p: float, *_, **__) -> Tensor:
    """Dropout whose mask is the same on every device."""
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) >= p
    return x * keep.to(x.device, x.dtype) / (1 - p)


def _ours(format: str, precision: str, values: dict, dropout: float, sketched: bool) -> dict[str, Tensor]:
    device, dtype = torch.device("cuda", torch.cuda.current_device()), DTYPES[precision]
    layer = ReLoRALinear(
        IN, OUT, torch.nn.Parameter(values["weight"]), None, r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout
    )
    layer.store_weight(
        format_named(format).quantize(values["weight"].to(device), dtype), format_named(format), as_buffer=True
    )
    for name in ("lora_A", "lora_B", "bias"):
        if name in values:
            setattr(layer, name, torch.nn.Parameter(values[name].to(device)))
    if sketched:
        layer.sketch = GradientSketch(RANK, IN, "key", device)
    x = values["x"].to(device).requires_grad_()
    y = layer(x)
    y.backward(values["upstream"].to(device))
    return {
        "y": y,
        "x": x.grad,
        "merged": layer.merged_weight(),
        **{name: parameter.grad for name, parameter in layer.named_parameters()},
    }


def _formula(format: str, precision: str, values: dict, dropout: float) -> dict[str, Tensor]:
    """On the CPU, in fp64."""
    packed = format_named(format)
    stored = packed.quantize(values["weight"], DTYPES[precision])
    weight = packed.dequantize(stored, values["weight"].shape, torch.float32).double()
    leaves = {
        name: value.double().requires_grad_() for name, value in values.items() if name not in ("weight", "upstream")
    }
    x = leaves["x"]
    dropped = _same_dropout(x, dropout) if dropout else x
    y = x @ weight.t() + 2 * dropped @ leaves["lora_A"].t() @ leaves["lora_B"].t() + leaves.get("bias", 0)
    y.backward(values["upstream"].double())
    return {
        "y": y,
        "merged": weight + 2 * leaves["lora_B"] @ leaves["lora_A"],
        **{name: leaf.grad for name, leaf in leaves.items()},
    }


def _relative(got: Tensor, expected: Tensor) -> float:
    assert got.is_cuda
    return ((got.detach().cpu().double() - expected.detach()).norm() / expected.norm()).item()


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_computes_what_the_formula_says(format):
    if format == "fp8_both_layouts":
        _skip_without_fp8()
    (errors,) = on_gpus(1, worst_errors, format)
    for precision, error in errors.items():
        in_fp8 = format == "fp8_both_layouts" and precision == "bf16"
        assert 0 < error < (WORST_IN_FP8 if in_fp8 else WORST[precision]), precision


def products_of_a_transposed_view() -> float:
    """In fp8, of rows that lie in memory by columns; its relative error."""
    device = torch.device("cuda", torch.cuda.current_device())
    rows = torch.randn(IN, ROWS, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16).t()
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    format = FP8(both_layouts=True)
    got = format.multiply(rows, format.quantize(weight.to(device), torch.bfloat16), weight.shape)
    return _relative(got, rows.cpu().double() @ weight.double().t())


def test_fp8_takes_rows_that_lie_by_columns():
    _skip_without_fp8()
    assert on_gpus(1, products_of_a_transposed_view)[0] < WORST_IN_FP8


def multiplies_in_fp8() -> bool:
    return multiplies_fp8(torch.device("cuda", torch.cuda.current_device()))


def _skip_without_fp8() -> None:
    if not on_gpus(1, multiplies_in_fp8)[0]:
        pytest.skip("this GPU does not multiply in fp8 by rows")


def test_a_layer_is_timed():
    (result,) = on_gpus(1, bench.run, tiny_arguments("--device", "cuda", "--hidden", "128", "--r", "16"))
    assert all(ms > 0 for entry in result["measured"] for ms in entry["ms"].values())

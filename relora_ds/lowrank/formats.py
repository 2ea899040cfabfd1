"""The formats of frozen weights by name, and which one a recipe asks for.

    dense                        the weight itself, in the precision that computes
    fp32, bf16, fp16             the same, in another precision than the one that computes
    int8                         8-bit integers, one scale for each row (output feature)
    fp8                          e4m3, one scale for each row (`lowrank.fp8`)
    nf4                          the 4-bit codes of QLoRA, one scale for 64 weights (`lowrank.nf4`)
    transposed_F                 any of them as F stores Wᵀ: what products with a weight kept as `[in, out]` ask for

`lowrank.base_format` says what a format is.
"""

import torch

from relora_ds.lowrank.base_format import Format, Packed, row_scale, scaled
from relora_ds.lowrank.fp8 import FP8
from relora_ds.lowrank.nf4 import NF4

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Cast(Packed):
    """Another floating-point precision than the one that computes."""

    def __init__(self, name: str):
        self.name, self.dtype = name, DTYPES[name]

    def floating_dtype(self, dtype):
        return self.dtype

    def parts(self, shape):
        return [(self.dtype, shape)]

    def quantize(self, value, dtype):
        return self.pack([value], value.shape)

    def dequantize(self, stored, shape, dtype):
        return self.unpack(stored, shape)[0].to(dtype)


class Int8(Packed):
    """Symmetric 8-bit integers; a row's scale is its largest magnitude / 127."""

    name = "int8"

    def parts(self, shape):
        return [(torch.int8, shape), (torch.float32, torch.Size([*shape[:-1], 1]))]

    def quantize(self, value, dtype):
        scale = row_scale(value, 127)
        return self.pack([(value / scale).round_(), scale], value.shape)

    def dequantize(self, stored, shape, dtype):
        return scaled(*self.unpack(stored, shape), dtype)


class Transposed(Format):
    """Products with a weight `[out, in]` whose transpose, `[in, out]`, is stored in another format."""

    def __init__(self, inner: Format):
        self.inner, self.name = inner, f"{_TRANSPOSED}{inner.name}"

    def floating_dtype(self, dtype):
        return self.inner.floating_dtype(dtype)

    def stored_like(self, shape, dtype, device):
        return self.inner.stored_like(_flipped(shape), dtype, device)

    def quantize(self, value, dtype):
        return self.inner.quantize(value.mT, dtype)

    def dequantize(self, stored, shape, dtype):
        return self.inner.dequantize(stored, _flipped(shape), dtype).mT

    def multiply(self, rows, stored, shape, factor=1.0):
        return self.inner.multiply_transposed(rows, stored, _flipped(shape), factor)

    def multiply_transposed(self, grad, stored, shape, factor=1.0):
        return self.inner.multiply(grad, stored, _flipped(shape), factor)

    def multiplies_codes(self, dtype, shape):
        return self.inner.multiplies_codes(dtype, _flipped(shape))


DENSE = Format()
_TRANSPOSED = "transposed_"
_PLAIN = (DENSE, *map(Cast, DTYPES), Int8(), FP8(), FP8(both_layouts=True), NF4(), NF4(double=True))
# Not a cached function: torch.compile warns of those.
_FORMATS: dict[str, Format] = {format.name: format for plain in _PLAIN for format in (plain, Transposed(plain))}


def format_named(name: str) -> Format:
    """Return the format of this name; `Format.name` of any of them."""
    return _FORMATS[name]


def format_of(frozen_dtype: str, precision: str, *, double_quant: bool = False, in_fp8: bool = False) -> Format:
    """Return the format that a recipe asks for.

    Args:
        frozen_dtype: auto, fp32, bf16, fp16, int8, nf4 or fp8.
        precision: of the run: fp32, bf16 or fp16.
        double_quant: quantize nf4's scales too.
        in_fp8: multiply fp8 weights in fp8 (see `multiplies_fp8`).
    """
    if frozen_dtype in ("auto", precision):
        return DENSE
    if frozen_dtype == "nf4" and double_quant:
        return format_named("nf4_double")
    if frozen_dtype == "fp8" and in_fp8 and precision == "bf16":
        return format_named("fp8_both_layouts")
    return format_named(frozen_dtype)


def transposed(format: Format) -> Format:
    """Return the format of products with a weight that `format` stores as `[in, out]`."""
    return format_named(f"{_TRANSPOSED}{format.name}")


def _flipped(shape: torch.Size) -> torch.Size:
    return torch.Size([*shape[:-2], shape[-1], shape[-2]])

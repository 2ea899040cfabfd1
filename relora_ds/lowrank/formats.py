"""How a frozen weight is stored, and how it multiplies.

A format turns an fp32 weight `[..., out, in]` into one stored tensor, and that of a matrix `[out, in]` into products:

    dense                        the weight itself, in the precision that computes
    fp32, bf16, fp16             the same, in another precision than the one that computes
    int8                         8-bit integers, one scale for each row (output feature)
    fp8                          e4m3, one scale for each row
    nf4                          the 4-bit codes of QLoRA (arXiv 2305.14314), one scale for 64 weights; by bitsandbytes
    transposed_F                 any of them as F stores Wᵀ: what products with a weight kept as `[in, out]` ask for

All but `dense` are *packed*: codes and scales follow each other in one flat tensor of bytes. So a weight stays
one tensor whatever its format: ZeRO partitions it, owners broadcast it and checksums cover it as they do a dense one,
and DeepSpeed's cast to 16 bit, which would round the scales, leaves bytes alone.

A dense copy of a packed weight lives for one product. Nothing here keeps it.
"""

import functools
import importlib.util
import math

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; what fp8 kernels want of their operands
BLOCK = 64  # weights that share one scale in nf4, as in QLoRA
SUPERBLOCK = 256  # of those scales that share one, where they are quantized themselves

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Format:
    """Dense storage, and what every format defines."""

    name = "dense"

    def unavailable(self) -> str | None:
        """Return why this machine lacks the format, and what to install; None where it has it."""
        return None

    def problem(self, shape: torch.Size) -> str | None:
        """Return why a weight of this shape cannot be stored so, and what to do; None where it can."""
        return None

    def floating_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """Return the floating-point dtype that values are rounded to one by one; None where they are quantized."""
        return dtype

    def stored_like(self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return an uninitialised stored tensor. dtype: of the run's computations."""
        return torch.empty(shape, dtype=dtype, device=device)

    def quantize(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a new stored tensor of an fp32 weight `[..., out, in]`, rounded to nearest. dtype: as above."""
        return value.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def dequantize(self, stored: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the weight `[..., out, in]` in `dtype`; may share the storage of `stored`."""
        return stored.view(shape).to(dtype)

    def multiply(self, rows: Tensor, stored: Tensor, shape: torch.Size, factor: float = 1.0) -> Tensor:
        """`factor · rows · Wᵀ`: `[n, in]` to `[n, out]`, of the dtype of `rows`, rounded once."""
        return _scaled_matmul(factor, rows, self.dequantize(stored, shape, rows.dtype).t())

    def multiply_transposed(self, grad: Tensor, stored: Tensor, shape: torch.Size, factor: float = 1.0) -> Tensor:
        """`factor · grad · W`: `[n, out]` to `[n, in]`, the gradient of the input."""
        return _scaled_matmul(factor, grad, self.dequantize(stored, shape, grad.dtype))

    def multiplies_codes(self, dtype: torch.dtype, shape: torch.Size) -> bool:
        """Return whether rows of `dtype` are multiplied with the codes themselves, and W is never dequantized."""
        return False


class Packed(Format):
    """Parts of several dtypes in one flat uint8 tensor, each aligned."""

    def floating_dtype(self, dtype):
        return None

    def parts(self, shape: torch.Size) -> list[tuple[torch.dtype, torch.Size]]:
        """Dtype and shape of what is packed, in order."""
        raise NotImplementedError

    def num_bytes(self, shape: torch.Size) -> int:
        """Bytes of a stored weight."""
        return sum(_aligned(dtype.itemsize * size.numel()) for dtype, size in self.parts(shape))

    def stored_like(self, shape, dtype, device):
        return torch.empty(self.num_bytes(shape), dtype=torch.uint8, device=device)

    def pack(self, parts: list[Tensor], shape: torch.Size) -> Tensor:
        """One tensor of `parts`."""
        stored = torch.zeros(self.num_bytes(shape), dtype=torch.uint8, device=parts[0].device)
        for view, part in zip(self.unpack(stored, shape), parts, strict=True):
            view.copy_(part)
        return stored

    def unpack(self, stored: Tensor, shape: torch.Size) -> list[Tensor]:
        """Return views of the parts."""
        views, offset = [], 0
        for dtype, size in self.parts(shape):
            length = dtype.itemsize * size.numel()
            views.append(stored[offset : offset + length].view(dtype).view(size))
            offset += _aligned(length)
        return views


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
        scale = _row_scale(value, 127)
        return self.pack([(value / scale).round_(), scale], value.shape)

    def dequantize(self, stored, shape, dtype):
        return _scaled(*self.unpack(stored, shape), dtype)


class FP8(Packed):
    """e4m3; a row's scale is its largest magnitude / 448, the largest number of e4m3.

    Args:
        both_layouts: keep the codes of Wᵀ beside those of W, and multiply in fp8 (`torch._scaled_mm` wants its second
            operand by columns: W for the output, Wᵀ for the input's gradient). Twice the bytes. The rows of
            activations and gradients are scaled as they come. Weights whose sides are no multiples of 16, and those
            that are no matrices, are stored and multiplied as without it.
    """

    LARGEST = 448.0

    def __init__(self, both_layouts: bool = False):
        self.both_layouts = both_layouts
        self.name = "fp8_both_layouts" if both_layouts else "fp8"

    def parts(self, shape):
        found = [(torch.float8_e4m3fn, shape), (torch.float32, torch.Size([*shape[:-1], 1]))]
        return found + [(torch.float8_e4m3fn, shape[::-1])] * self._keeps_both(shape)

    def quantize(self, value, dtype):
        scale = _row_scale(value, self.LARGEST)
        codes = (value / scale).to(torch.float8_e4m3fn)
        return self.pack([codes, scale, codes.mT][: 2 + self._keeps_both(value.shape)], value.shape)

    def dequantize(self, stored, shape, dtype):
        codes, scale = self.unpack(stored, shape)[:2]
        # torch converts e4m3 one by one on a CPU, 10 times slower than by the bits.
        return (_scaled_e4m3_bits if codes.device.type == "cpu" else _scaled)(codes, scale, dtype)

    def multiply(self, rows, stored, shape, factor=1.0):
        if not self._in_fp8(rows, shape):
            return super().multiply(rows, stored, shape, factor)
        codes, scale, _ = self.unpack(stored, shape)
        return _scaled_product(*_quantized_rows(rows), codes.t(), factor * scale.t(), rows.dtype, fast=True)

    def multiply_transposed(self, grad, stored, shape, factor=1.0):
        if not self._in_fp8(grad, shape):
            return super().multiply_transposed(grad, stored, shape, factor)
        _, scale, transposed = self.unpack(stored, shape)
        # W's scales belong to the dimension that is summed over: they go to the gradient's columns. Codes of Wᵀ with
        # scales of their own would do without, but be of another W than forward's, and in every step the same other.
        alike = torch.full((1, shape[1]), factor, device=grad.device)
        return _scaled_product(*_quantized_rows(grad, scale.t()), transposed.t(), alike, grad.dtype, fast=False)

    def _keeps_both(self, shape: torch.Size) -> bool:
        return self.both_layouts and len(shape) == 2 and all(size % ALIGNMENT == 0 for size in shape)

    def multiplies_codes(self, dtype, shape):
        return dtype == torch.bfloat16 and self._keeps_both(shape)

    def _in_fp8(self, rows: Tensor, shape: torch.Size) -> bool:
        return len(rows) > 0 and self.multiplies_codes(rows.dtype, shape)


class NF4(Packed):
    """QLoRA's 4-bit codes: quantiles of the normal distribution, scaled by the largest magnitude of 64 weights.

    Args:
        double: quantize the scales as well, to 8 bit in groups of 256 (QLoRA's double quantization): 4.13 bits a
            weight instead of 4.5.
    """

    def __init__(self, double: bool = False):
        self.double = double
        self.name = "nf4_double" if double else "nf4"

    def unavailable(self):
        remedy = 'pip install ".[quantization]", or use frozen_dtype=int8'
        if importlib.util.find_spec("bitsandbytes") is None:
            return f"needs bitsandbytes; {remedy}"
        try:
            _bitsandbytes()
        except Exception as error:  # a library of another CUDA version, for instance: whatever it raises
            return f"needs bitsandbytes, which cannot be imported ({error}); {remedy}"
        return None

    def problem(self, shape):
        if shape.numel() % BLOCK:
            return (
                f"nf4 stores blocks of {BLOCK} weights, which do not divide its {'x'.join(map(str, shape))}; leave it "
                "out of relora.target_modules, or use frozen_dtype=int8"
            )
        return None

    def parts(self, shape):
        blocks = shape.numel() // BLOCK
        codes = (torch.uint8, torch.Size([shape.numel() // 2, 1]))
        if not self.double:
            return [codes, (torch.float32, torch.Size([blocks]))]
        return [
            codes,
            (torch.uint8, torch.Size([blocks])),
            (torch.float32, torch.Size([-(-blocks // SUPERBLOCK)])),
            (torch.float32, torch.Size([1])),
        ]

    def quantize(self, value, dtype):
        codes, scale = _bitsandbytes().quantize_4bit(value.contiguous(), BLOCK, "nf4", torch.uint8)
        if not self.double:
            return self.pack([codes, scale], value.shape)
        offset = scale.mean()
        inner, outer = _bitsandbytes().quantize_blockwise(scale - offset, _dynamic_map(value.device), SUPERBLOCK)
        return self.pack([codes, inner, outer, offset.view(1)], value.shape)

    def dequantize(self, stored, shape, dtype):
        codes, *scales = self.unpack(stored, shape)
        if self.double:
            inner, outer, offset = scales
            scale = (
                _bitsandbytes().dequantize_blockwise(
                    inner, outer, _dynamic_map(stored.device), SUPERBLOCK, torch.float32
                )
                + offset
            )
        else:
            (scale,) = scales
        # One block a row: its AVX-512 kernel takes other scales where rows end within a block (bitsandbytes 0.50).
        blocks = torch.Size([scale.numel(), BLOCK])
        return _bitsandbytes().dequantize_4bit(codes, scale, BLOCK, "nf4", blocks, dtype).view(shape)


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


@functools.cache
def format_named(name: str) -> Format:
    """Return the format of this name; `Format.name` of any of them."""
    if name.startswith(_TRANSPOSED):
        return Transposed(format_named(name.removeprefix(_TRANSPOSED)))
    known = (DENSE, *map(Cast, DTYPES), Int8(), FP8(), FP8(both_layouts=True), NF4(), NF4(double=True))
    return {format.name: format for format in known}[name]


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


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether a device multiplies in fp8 with a scale for each row: Hopper and newer."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def transposed(format: Format) -> Format:
    """Return the format of products with a weight that `format` stores as `[in, out]`."""
    return format_named(f"{_TRANSPOSED}{format.name}")


def _flipped(shape: torch.Size) -> torch.Size:
    return torch.Size([*shape[:-2], shape[-1], shape[-2]])


def _scaled_matmul(factor: float, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if factor == 1 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=factor)


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _row_scale(value: Tensor, largest: float) -> Tensor:
    """fp32 `[..., rows, 1]`; a row of zeros has a scale too, that nothing is divided by zero."""
    return (_largest(value) / largest).clamp_(min=torch.finfo(torch.float32).tiny)


def _largest(rows: Tensor) -> Tensor:
    """Return the largest magnitude of each row, fp32 `[..., 1]`, in one pass; `abs()` would write a copy first."""
    return torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True).float()


def _scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes · scale`: exact codes, one rounding, one copy."""
    return codes.to(dtype).mul_(scale)


def _scaled_e4m3_bits(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the same for e4m3: its bits at their places in fp16, whose exponents are offset by 8 more."""
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).to(dtype).mul_(scale * 2**8)


def _quantized_rows(rows: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round rows of 16 bit `[n, k]` to e4m3; nothing wider is made of them.

    Args:
        columns: `[1, k]`, multiplied to every row before.

    Returns:
        The codes, which lie in memory row by row as CUDA's product wants them, however `rows` lie; and the rows'
        scales, fp32 `[n, 1]`.
    """
    own = None if columns is None else rows * columns.to(rows.dtype)
    rows = rows if own is None else own
    largest = _largest(rows).clamp_(min=FP8.LARGEST * 2**-126)  # the inverse of a row of zeros would be infinite
    inverse = (FP8.LARGEST / largest).to(rows.dtype)  # rounded first, that the scale is the inverse of what multiplies
    codes = torch.mul(rows, inverse, out=own).to(torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return codes, inverse.float().reciprocal_()


def _scaled_product(
    rows: Tensor, row_scale: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """`(rows · row_scale) · (codes · scale)`: e4m3 by rows `[n, k]` and by columns `[k, m]`; fp32 `[n, 1]`, `[1, m]`.

    fast: add up in fewer bits than fp32's; gradients are not (NVIDIA's TransformerEngine does the same).
    """
    return torch._scaled_mm(rows, codes, scale_a=row_scale, scale_b=scale, out_dtype=dtype, use_fast_accum=fast)


@functools.cache
def _bitsandbytes():
    """Its operators: plain functions of tensors, on the CPU as on GPUs. Imported when first used: it takes seconds."""
    import bitsandbytes  # noqa: F401, PLC0415

    return torch.ops.bitsandbytes


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' 256 values of 8 bit, fp32."""
    from bitsandbytes.functional import create_dynamic_map  # noqa: PLC0415

    return create_dynamic_map().to(device)

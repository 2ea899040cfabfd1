"""fp8: e4m3 with one scale for each row, stored in one layout or two, and products in fp8."""

import torch
from torch import Tensor

from relora_ds.lowrank.base_format import ALIGNMENT, Packed, row_largest, row_scale, scaled


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
        scale = row_scale(value, self.LARGEST)
        codes = (value / scale).to(torch.float8_e4m3fn)
        return self.pack([codes, scale, codes.mT][: 2 + self._keeps_both(value.shape)], value.shape)

    def dequantize(self, stored, shape, dtype):
        codes, scale = self.unpack(stored, shape)[:2]
        # torch converts e4m3 one by one on a CPU, 10 times slower than by the bits.
        return (_scaled_e4m3_bits if codes.device.type == "cpu" else scaled)(codes, scale, dtype)

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


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether a device multiplies in fp8 with a scale for each row: Hopper and newer."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


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
    largest = row_largest(rows).clamp_(min=FP8.LARGEST * 2**-126)  # the inverse of a row of zeros would be infinite
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

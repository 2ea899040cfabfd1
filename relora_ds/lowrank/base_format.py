"""What a storage format is: one stored tensor of a weight, and products with it.

A format turns an fp32 weight `[..., out, in]` into one stored tensor, and that of a matrix `[out, in]` into products.
`Format` is dense. All others are *packed*: codes and scales follow each other in one flat tensor of bytes. So a weight
stays one tensor whatever its format: ZeRO partitions it, owners broadcast it and checksums cover it as they do a dense
one, and DeepSpeed's cast to 16 bit, which would round the scales, leaves bytes alone.

A dense copy of a packed weight lives for one product. Nothing here keeps it.
"""

import math

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; what fp8 kernels want of their operands


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


def _scaled_matmul(factor: float, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if factor == 1 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=factor)


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def row_scale(value: Tensor, largest: float) -> Tensor:
    """Return the scale of each row, fp32 `[..., rows, 1]`; that of a row of zeros is not 0 either."""
    return (row_largest(value) / largest).clamp_(min=torch.finfo(torch.float32).tiny)


def row_largest(rows: Tensor) -> Tensor:
    """Return the largest magnitude of each row, fp32 `[..., 1]`, in one pass; `abs()` would write a copy first."""
    return torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True).float()


def scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `codes · scale`: exact codes, one rounding, one copy."""
    return codes.to(dtype).mul_(scale)

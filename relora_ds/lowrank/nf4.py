"""nf4: the 4-bit codes of QLoRA (arXiv 2305.14314), by bitsandbytes."""

import functools
import importlib.util

import torch
from torch import Tensor

from relora_ds.lowrank.base_format import Packed

BLOCK = 64  # weights that share one scale in nf4, as in QLoRA
SUPERBLOCK = 256  # of those scales that share one, where they are quantized themselves


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

"""The frozen weight: how a merged update reaches the copy that forward reads.

A bf16 weight of standard deviation 0.02 has a spacing of about 1e-4 between neighbouring values: an
update of that size, added in place, is mostly rounded away. So the sum is made in fp32 and only the
stored copy is rounded, once, from the whole sum.
"""

import torch
from torch import Tensor


def storage_problems(frozen_dtype: str, frozen_master: str, precision: str) -> list[str]:
    """Why frozen weights cannot be stored as asked for in a run of `precision`, one message each."""
    found = []
    if frozen_dtype not in ("auto", precision):
        found.append(f"relora.frozen_dtype: {frozen_dtype} is not available in a run of precision {precision}: "
                     "DeepSpeed casts all weights alike; use frozen_dtype=auto")
    if frozen_master == "none" and precision == "fp16":
        found.append("relora.frozen_master: none needs weights stored in bf16 or fp32, where they can be rounded "
                     "without bias; use frozen_master=cpu")
    return found


def add_update_(base: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`base += scaling · lora_B · lora_A`, in place. All fp32: `[out, in]`, `[r, in]`, `[out, r]`."""
    assert base.dtype == lora_A.dtype == lora_B.dtype == torch.float32
    return base.addmm_(lora_B, lora_A, alpha=scaling)


def to_stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored copy of an fp32 weight that has an fp32 master: rounded to nearest."""
    return value.to(dtype)


def to_stored_unbiased(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """The stored copy of an fp32 weight that has *no* master: rounded stochastically.

    The expectation equals `value`, so that many small updates add up. Rounding to nearest would drop
    each of them. bf16 is fp32 without its low 16 bits: adding 16 uniform random bits and truncating
    rounds up with exactly the probability that the dropped bits stand for.

    Args:
        value: fp32, any shape, finite.
        dtype: `torch.bfloat16` or `torch.float32` (returned as it is).
        generator: on the device of `value`.
    """
    if dtype == torch.float32:
        return value
    assert dtype == torch.bfloat16, dtype
    noise = torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32, device=value.device)
    bits = value.contiguous().view(torch.int32) + noise
    return (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)

"""The frozen weight at a merge: how an update reaches the copy that forward reads.

A bf16 weight of standard deviation 0.02 has a spacing of about 1e-4 between neighbouring values: an
update of that size, added in place, is mostly rounded away; of 8 and 4 bits even more is. So the sum is made in
fp32 and only the stored copy is rounded, once, from the whole sum.
"""

import torch
from torch import Tensor

from relora_ds.lowrank.precision import exact_products

_LEDGER_SAMPLE = 1 << 12  # weights of a layer


def add_update_(base: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, transposed: bool = False) -> Tensor:
    """Add `scaling · lora_B · lora_A` to `base`, in place, and return it.

    All fp32, of two or three dimensions: `[..., out, in]` (transposed: `[..., in, out]`), `[..., r, in]` and
    `[..., out, r]`.
    """
    assert base.dtype == lora_A.dtype == lora_B.dtype == torch.float32
    first, second = (lora_A.mT, lora_B.mT) if transposed else (lora_B, lora_A)
    with exact_products():
        return (base.addmm_ if base.ndim == 2 else base.baddbmm_)(first, second, alpha=scaling)


def merge_(about: dict, base: Tensor, lora_A: Tensor, lora_B: Tensor, decay: float = 1.0) -> Tensor:
    """Make a low-rank layer's weight `ρ·W + s·B·A`, in place. about: `LowRankLayer.about()`; decay: ρ. fp32."""
    if decay != 1:
        base.mul_(decay)
    return add_update_(base, lora_A, lora_B, about["scaling"], transposed=about.get("transposed", False))


def plain_name(name: str, about: dict) -> str:
    """Return the name, in the plain model, of the weight of the low-rank layer `name`. about: as for `merge_`."""
    return name if about.get("is_parameter", False) else f"{name}.weight"


def round_unbiased(value: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values rounded stochastically to what bf16 represents; for weights that have *no* master.

    The expectation equals `value`, so that many small updates add up. Rounding to nearest would drop
    each of them. bf16 is fp32 without its low 16 bits: adding 16 uniform random bits and truncating
    rounds up with exactly the probability that the dropped bits stand for.

    Args:
        value: fp32, any shape, finite.
        generator: on the device of `value`.
    """
    noise = torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32, device=value.device)
    return noise.add_(value.contiguous().view(torch.int32)).bitwise_and_(~0xFFFF).view(torch.float32)


class MergeLedger:
    """What merges meant to add to one weight and what its stored copy lost of it, summed over all restarts.

    Both sums are kept for an evenly spaced sample of the weights (all of them in small layers), on the CPU: a second
    and third copy of every frozen weight would be too much for a metric.
    """

    def __init__(self, numel: int):
        # An odd stride: a power of two would see the same place of every block of a quantized weight.
        self._stride = max(1, numel // _LEDGER_SAMPLE) | 1
        num_sampled = len(range(0, numel, self._stride))
        self.intended, self.lost = torch.zeros(num_sampled), torch.zeros(num_sampled)

    def clear(self) -> None:
        """Begin again."""
        self.intended.zero_()
        self.lost.zero_()

    def sample(self, value: Tensor) -> Tensor:
        """Its places of a full-size tensor: 1-D, a copy."""
        return value.flatten()[:: self._stride].clone()

    def add(self, intended: Tensor, lost: Tensor) -> None:
        """Add a merge, by samples on the CPU: the update, and what the stored copy has more or less than it."""
        self.intended += intended
        self.lost += lost

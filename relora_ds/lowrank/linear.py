"""ReLoRALinear: a linear layer whose weight is frozen and whose low-rank update trains.

    y = x Wᵀ + s · (x Aᵀ) Bᵀ + b,     s = lora_alpha / r        (paper Eq. 2)

`lora_A`, `lora_B` and the bias are direct parameters beside the frozen weight, so that the layer's
state dict is the linear's own plus two entries.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_ds.lowrank.formats import DENSE, Format
from relora_ds.lowrank.kernels import FrozenLinearFunction, lowrank_linear
from relora_ds.lowrank.precision import exact_products
from relora_ds.lowrank.reinit import GradientSketch
from relora_ds.lowrank.seeding import keyed_generator


def initial_A(r: int, in_features: int, *, seed: int, restart: int, name: str) -> Tensor:
    """The value that `lora_A` takes at restart number `restart` (0 = at wrapping): fp32 `[r, in_features]` on CPU.

    Kaiming-uniform with a=√5, as LoRA initialises it. The generator is seeded by (seed, restart, module
    name) and nothing else: every rank, at every ZeRO stage and world size, computes the same values
    without communication.
    """
    return _kaiming(r, in_features, f"{seed}/{restart}/{name}")


def initial_B(out_features: int, r: int, *, seed: int, name: str) -> Tensor:
    """Kaiming `lora_B`, fp32 `[out_features, r]`: only for LoRA without a base, where B = 0 would mean y = 0."""
    return _kaiming(out_features, r, f"{seed}/0/{name}.lora_B")


def _kaiming(rows: int, columns: int, key: str) -> Tensor:
    value = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    return nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=keyed_generator(key))


class ReLoRALinear(nn.Module):
    """A linear layer that trains `lora_A [r, in]` and `lora_B [out, r]` beside a frozen `weight [out, in]`.

    The factors are created empty: `lowrank.wrap` gives them their values, because those depend on the
    module's name. `weight` may be None (the paper's LoRA baseline: `y = s·B·A·x`). It is dense at first; `store_weight`
    puts it into another format.

    Args:
        weight: the weight to freeze, taken over (not copied), or None.
        bias: taken over and trained, or None.
        r, lora_alpha, lora_dropout: as in PEFT's `LoraConfig`.

    Attributes:
        initial_seed: decides the values that the factors have when an engine is built, where the model had no values at
            wrapping (on the meta device, or partitioned by ZeRO-3); None: they keep those that they have.
        sketch: set it to a `GradientSketch`, and every backward adds W's gradient to it (not with dropout).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.scaling = lora_alpha / r
        self.lora_dropout = lora_dropout
        if weight is not None:
            weight.requires_grad_(False)
        self.format: Format = DENSE
        self.sketch: GradientSketch | None = None
        self.initial_seed: int | None = None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if self.training and self.lora_dropout > 0:
            return self._forward_with_dropout(x)
        return lowrank_linear(
            x, self.weight, self.lora_A, self.lora_B, self.bias, self.scaling, self.format, self.sketch
        )

    def _forward_with_dropout(self, x: Tensor) -> Tensor:
        # Dropout stands on the low-rank branch only (as in PEFT), so its input differs from the dense
        # product's and nothing can be fused.
        dropped = F.dropout(x, self.lora_dropout)
        update = lowrank_linear(dropped, None, self.lora_A, self.lora_B, self.bias, self.scaling)
        if self.weight is None:
            return update
        return FrozenLinearFunction.apply(x, self.weight, self.lora_A, self.lora_B, self.format.name) + update

    @property
    def weight_shape(self) -> torch.Size:
        """`[out_features, in_features]`, however the weight is stored."""
        return torch.Size([self.out_features, self.in_features])

    def store_weight(self, stored: Tensor, format: Format, *, as_buffer: bool) -> None:
        """Replace the frozen weight by one that `format` has quantized.

        as_buffer: as a buffer outside of the state dict instead of a parameter; ZeRO leaves those alone.
        """
        del self.weight
        self.format = format
        if as_buffer:
            self.register_buffer("weight", stored, persistent=False)
        else:
            self.register_parameter("weight", nn.Parameter(stored, requires_grad=False))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """`W + s·B·A` in fp32, `[out_features, in_features]`; a new tensor."""
        with exact_products():
            update = self.lora_B.float() @ self.lora_A.float() * self.scaling
        if self.weight is None:
            return update
        return update.add_(self.format.dequantize(self.weight, self.weight_shape, torch.float32))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"scaling={self.scaling:g}, base={self.weight is not None}, bias={self.bias is not None}, "
            f"format={self.format.name}"
        )

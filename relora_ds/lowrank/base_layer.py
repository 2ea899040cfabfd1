"""What every low-rank layer is: a frozen weight, two factors, and the answers that the engine asks for.

The weight stays in the layout of the model that was wrapped, so that its values go in and out as they are:

    nn.Linear                         weight `[out, in]`
    transformers' Conv1D (GPT-2)      weight `[in, out]`: transposed
    experts of a mixture              weight `[experts, out, in]`, or transposed; factors for each expert

`lora_A [..., r, in]` and `lora_B [..., out, r]` are the same for all of them. Both train; in a one-sided layer B does,
and A is an orthonormal basis that changes at restarts only.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from relora_ds.lowrank.base_format import Format
from relora_ds.lowrank.formats import DENSE
from relora_ds.lowrank.frozen import merge_, plain_name
from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.lowrank.reinit import ROW_NORM, GradientTap, random_basis
from relora_ds.lowrank.seeding import keyed_generator


def initial_A(r: int, in_features: int, *, seed: int | str, restart: int, name: str) -> Tensor:
    """Return the value of `lora_A` at restart number `restart` (0 = at wrapping): fp32 `[r, in_features]` on the CPU.

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


class LowRankLayer(nn.Module):
    """A module with a frozen `weight` and the factors `lora_A` and `lora_B`.

    The factors are created empty: `lowrank.wrap` gives them their values, because those depend on the module's name.

    Args:
        weight_shape: of the plain weight, in the model's layout.
        weight: the weight to freeze, taken over (not copied), or None (LoRA without a base: `s·B·A` alone).
        r, lora_alpha, use_rslora: as in PEFT's `LoraConfig`; `s = lora_alpha / r`, or `lora_alpha / √r`.
        one_sided: A is frozen.
        transposed: the weight is `[..., in, out]`.
        is_parameter: the weight is a parameter of the plain model's module, not the `weight` of a module of its own.

    Attributes:
        weight: dense at first; `store_weight` puts it into another format.
        initial_seed: decides the values that the factors have when an engine is built, where the model had no values at
            wrapping (on the meta device, or partitioned by ZeRO-3); None: they keep those that they have.
        decay: ρ, a tensor without dimensions on the CPU: the layer computes with `ρ·W`. None: 1.
        sketch: set it to a `GradientTap`, and every backward adds W's gradient to it (linears, without dropout).
        gradient_sum: the same, for experts too.
    """

    weight: Any  # a parameter, a buffer or None
    lora_dropout: float = 0.0
    decay: Tensor | None = None

    def __init__(
        self,
        weight_shape: torch.Size,
        weight: nn.Parameter | None,
        *,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        one_sided: bool = False,
        transposed: bool = False,
        is_parameter: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        super().__init__()
        *experts, rows, columns = self.weight_shape = torch.Size(weight_shape)
        self.in_features, self.out_features = (rows, columns) if transposed else (columns, rows)
        self.experts = torch.Size(experts)
        self.r, self.scaling = r, lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.one_sided, self.transposed, self.is_parameter = one_sided, transposed, is_parameter
        self.format: Format = DENSE
        self.sketch: GradientTap | None = None
        self.gradient_sum: GradientSum | None = None
        self.initial_seed: int | None = None
        if weight is not None:
            weight.requires_grad_(False)
        self.register_parameter("weight", weight)
        lora_A = torch.empty(self.shape_of_A, dtype=dtype, device=device)
        self.lora_A = nn.Parameter(lora_A, requires_grad=not one_sided)
        self.lora_B = nn.Parameter(torch.empty(*experts, self.out_features, r, dtype=dtype, device=device))

    def initial_A(self, name: str, *, seed: int | str, restart: int) -> Tensor:
        """Return what `lora_A` begins with, fp32 on the CPU: `initial_A`, or a random basis. name: of this layer."""
        if self.one_sided:
            return random_basis(self.shape_of_A, f"{seed}/{restart}/{name}")
        rows = self.experts.numel() * self.r
        return initial_A(rows, self.in_features, seed=seed, restart=restart, name=name).view(self.shape_of_A)

    @property
    def taps(self) -> tuple[GradientTap, ...]:
        """What every backward adds W's gradient to."""
        return tuple(tap for tap in (self.sketch, self.gradient_sum) if tap is not None)

    @property
    def shape_of_gradient(self) -> torch.Size:
        """`[..., out, in]`, in whatever layout the weight is."""
        return torch.Size((*self.experts, self.out_features, self.in_features))

    @property
    def shape_of_A(self) -> torch.Size:
        """`[..., r, in]`, also where ZeRO-3 has A partitioned."""
        return torch.Size((*self.experts, self.r, self.in_features))

    def initial_B(self, name: str, *, seed: int) -> Tensor:
        """Return what `lora_B` begins with, fp32 on the CPU: 0, or without a base `initial_B`."""
        shape = (*self.experts, self.out_features, self.r)
        if self.weight is not None:
            return torch.zeros(shape)
        return initial_B(self.experts.numel() * self.out_features, self.r, seed=seed, name=name).view(shape)

    def plain_name(self, name: str) -> str:
        """Return the weight's name in the plain model (in the wrapped one: `{name}.weight`). name: of this layer."""
        return plain_name(name, self.about())

    def about(self) -> dict:
        """Return what a reader of its tensors must know of the layer, as JSON; what is false by default is left out."""
        flags = {"transposed": self.transposed, "is_parameter": self.is_parameter, "one_sided": self.one_sided}
        return {
            "scaling": self.scaling,
            "base": self.weight is not None,
            "shape": list(self.weight_shape),
            **{flag: True for flag, value in flags.items() if value},
        }

    def add_update_(self, base: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Add `s·B·A` to `base`, of the weight's shape, in place, and return it. All fp32."""
        return merge_(self.about(), base, lora_A, lora_B)

    def merge_(self, base: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Make `base`, the weight, `ρ·base + s·B·A`, in place, and return it. All fp32."""
        return merge_(self.about(), base, lora_A, lora_B, self.rho)

    @property
    def rho(self) -> float:
        """What weight decay has left of W since W was last written."""
        return 1.0 if self.decay is None else float(self.decay)

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

    def freeze_A_in_buffer(self, lora_A: Tensor) -> None:
        """Replace the frozen A by a buffer outside of the state dict; ZeRO leaves those alone."""
        assert self.one_sided
        del self.lora_A
        self.register_buffer("lora_A", lora_A, persistent=False)

    @property
    def row_norm(self) -> float:
        """The length of A's rows where they are orthogonal."""
        return 1.0 if self.one_sided else ROW_NORM

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return `ρ·W + s·B·A` in fp32, in the shape of the plain weight; a new tensor."""
        update = torch.zeros(self.weight_shape, device=self.lora_A.device)
        self.add_update_(update, self.lora_A.float(), self.lora_B.float())
        if self.weight is None:
            return update
        return update.add_(self.format.dequantize(self.weight, self.weight_shape, torch.float32), alpha=self.rho)

    def extra_repr(self) -> str:
        return (
            f"weight_shape={tuple(self.weight_shape)}, transposed={self.transposed}, r={self.r}, "
            f"scaling={self.scaling:g}, base={self.weight is not None}, format={self.format.name}"
        )

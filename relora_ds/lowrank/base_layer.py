"""What every low-rank layer is: a frozen weight, two factors, and the answers that the engine asks for.

`lora_A [..., r, in]` and `lora_B [..., out, r]` are the same for all layouts of the weight; experts of a mixture have
factors each. Both train; in a one-sided layer B does, and A is an orthonormal basis that changes at restarts only.
"""

import math

import torch
from torch import Tensor, nn

from relora_ds.lowrank.frozen import merge_
from relora_ds.lowrank.owned_layer import OwnedLayer
from relora_ds.lowrank.reinit import ROW_NORM, random_basis
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


class LowRankLayer(OwnedLayer):
    """A layer whose weight is frozen, with the factors `lora_A` and `lora_B`.

    The factors are created empty: `lowrank.wrap` gives them their values, because those depend on the module's name.

    Args:
        weight_shape, weight, layout: as of an `OwnedLayer`; a weight None is LoRA without a base, `s·B·A` alone.
        r, lora_alpha, use_rslora: as in PEFT's `LoraConfig`; `s = lora_alpha / r`, or `lora_alpha / √r`.
        one_sided: A is frozen.

    Attributes:
        initial_seed: decides the values that the factors have when an engine is built, where the model had no values at
            wrapping (on the meta device, or partitioned by ZeRO-3); None: they keep those that they have.
    """

    lora_dropout: float = 0.0
    initial_seed: int | None = None

    def __init__(
        self,
        weight_shape: torch.Size,
        weight: nn.Parameter | None,
        *,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        one_sided: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        **layout: bool,
    ):
        super().__init__(weight_shape, weight, **layout)
        self.r, self.scaling = r, lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.one_sided = one_sided
        lora_A = torch.empty(self.shape_of_A, dtype=dtype, device=device)
        self.lora_A = nn.Parameter(lora_A, requires_grad=not one_sided)
        self.lora_B = nn.Parameter(torch.empty(*self.experts, self.out_features, r, dtype=dtype, device=device))

    def initial_A(self, name: str, *, seed: int | str, restart: int) -> Tensor:
        """Return what `lora_A` begins with, fp32 on the CPU: `initial_A`, or a random basis. name: of this layer."""
        if self.one_sided:
            return random_basis(self.shape_of_A, f"{seed}/{restart}/{name}")
        rows = self.experts.numel() * self.r
        return initial_A(rows, self.in_features, seed=seed, restart=restart, name=name).view(self.shape_of_A)

    @property
    def dtype(self) -> torch.dtype:
        """Return that of the factors, in which the layer computes."""
        return self.lora_A.dtype

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

    def about(self) -> dict:
        """Return what a reader of its tensors must know of the layer, as JSON; what is false by default is left out."""
        return {"scaling": self.scaling, **super().about(), **({"one_sided": True} if self.one_sided else {})}

    def add_update_(self, base: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Add `s·B·A` to `base`, of the weight's shape, in place, and return it. All fp32."""
        return merge_(self.about(), base, lora_A, lora_B)

    def merge_(self, base: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Make `base`, the weight, `ρ·base + s·B·A`, in place, and return it. All fp32."""
        return merge_(self.about(), base, lora_A, lora_B, self.rho)

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

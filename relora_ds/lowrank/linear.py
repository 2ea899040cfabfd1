"""ReLoRALinear: a linear layer whose weight is frozen and whose low-rank update trains.

    y = x Wᵀ + s · (x Aᵀ) Bᵀ + b,     s = lora_alpha / r        (paper Eq. 2)

computed so, or as `x (W + s·B·A)ᵀ + b` where that takes less time (`lowrank.folding`).

`lora_A`, `lora_B` and the bias are direct parameters beside the frozen weight, so that the layer's
state dict is the linear's own plus two entries.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_ds.lowrank import folding
from relora_ds.lowrank.base_layer import LowRankLayer, initial_A, initial_B
from relora_ds.lowrank.formats import transposed as transposed_format
from relora_ds.lowrank.kernels import FrozenLinearFunction, lowrank_linear

__all__ = ["ReLoRALinear", "initial_A", "initial_B"]


class ReLoRALinear(LowRankLayer):
    """A linear layer that trains `lora_A [r, in]` and `lora_B [out, r]` beside a frozen `weight`.

    Args:
        weight: `[out, in]`, or `[in, out]` with `transposed` (transformers' Conv1D); see `LowRankLayer`.
        bias: taken over and trained, or None.
        lora_dropout: as in PEFT's `LoraConfig`.
        product: auto, folded or separate, see `ReLoRAConfig`.
        options: those of `LowRankLayer`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        *,
        lora_dropout: float = 0.0,
        transposed: bool = False,
        product: str = "auto",
        **options,
    ):
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        super().__init__(torch.Size(shape), weight, transposed=transposed, **options)
        self.lora_dropout, self.product = lora_dropout, product
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        if self.training and self.lora_dropout > 0:
            return self._forward_with_dropout(x)
        return lowrank_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            self.scaling,
            self._product_format,
            self.taps,
            self.decay,
            self.folds(x.shape[:-1].numel()),
        )

    def folds(self, tokens: int) -> bool:
        """Return whether a product with so many rows is made with `W + s·B·A`; while `lora_dropout` acts, none is."""
        shape = torch.Size([self.out_features, self.in_features])
        if self.weight is None or self._product_format.multiplies_codes(self.lora_A.dtype, shape):
            return False
        if self.product != "auto":
            return self.product == "folded"
        return tokens >= folding.folds_from(*shape, trains_A=self.lora_A.requires_grad)

    def _forward_with_dropout(self, x: Tensor) -> Tensor:
        # Dropout stands on the low-rank branch only (as in PEFT), so its input differs from the dense
        # product's and nothing can be fused.
        dropped = F.dropout(x, self.lora_dropout)
        update = lowrank_linear(dropped, None, self.lora_A, self.lora_B, self.bias, self.scaling)
        if self.weight is None:
            return update
        shape, format = (self.lora_A, self.lora_B), self._product_format.name
        return FrozenLinearFunction.apply(x, self.weight, *shape, format, self.decay, None, (), None) + update

    @property
    def _product_format(self):
        """The format as the kernels see it, for whom W is `[out, in]`."""
        return transposed_format(self.format) if self.transposed else self.format

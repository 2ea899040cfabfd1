"""ReLoRALinear: a linear layer whose weight is frozen and whose low-rank update trains.

    y = x Wᵀ + s · (x Aᵀ) Bᵀ + b,     s = lora_alpha / r        (paper Eq. 2)

`lora_A`, `lora_B` and the bias are direct parameters beside the frozen weight, so that the layer's
state dict is the linear's own plus two entries.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        **options,
    ):
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        super().__init__(torch.Size(shape), weight, transposed=transposed, **options)
        self.lora_dropout = lora_dropout
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        if self.training and self.lora_dropout > 0:
            return self._forward_with_dropout(x)
        return lowrank_linear(
            x, self.weight, self.lora_A, self.lora_B, self.bias, self.scaling, self._product_format, self.sketch
        )

    def _forward_with_dropout(self, x: Tensor) -> Tensor:
        # Dropout stands on the low-rank branch only (as in PEFT), so its input differs from the dense
        # product's and nothing can be fused.
        dropped = F.dropout(x, self.lora_dropout)
        update = lowrank_linear(dropped, None, self.lora_A, self.lora_B, self.bias, self.scaling)
        if self.weight is None:
            return update
        return FrozenLinearFunction.apply(x, self.weight, self.lora_A, self.lora_B, self._product_format.name) + update

    @property
    def _product_format(self):
        """The format as the kernels see it, for whom W is `[out, in]`."""
        return transposed_format(self.format) if self.transposed else self.format

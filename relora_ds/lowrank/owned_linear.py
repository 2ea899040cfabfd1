"""OwnedLinear: a linear layer that neither freezes its weight nor lets autograd train it.

    y = x Wᵀ + b

Backward adds the gradient of W to `gradient_sum` instead of making a tensor of its own for it. The weight's owner takes
it from there (`zero.owner_steps`).
"""

import torch
from torch import Tensor, nn

from relora_ds.lowrank.formats import transposed as transposed_format
from relora_ds.lowrank.kernels import FrozenLinearFunction
from relora_ds.lowrank.owned_layer import OwnedLayer


class OwnedLinear(OwnedLayer):
    """A linear layer with a `weight` that its owner updates.

    Args:
        weight: `[out, in]`, or `[in, out]` with `transposed` (transformers' Conv1D).
        bias: taken over, and trained by DeepSpeed's optimizer; or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        transposed: bool = False,
    ):
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        super().__init__(torch.Size(shape), weight, transposed=transposed)
        self.register_parameter("bias", bias)
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        format = transposed_format(self.format) if self.transposed else self.format
        shape = x.new_empty(0, self.in_features), x.new_empty(self.out_features, 0)
        return FrozenLinearFunction.apply(
            x, self.weight, *shape, format.name, self.decay, self.bias, self.taps, self._anchor
        )

    def extra_repr(self) -> str:
        return f"weight_shape={tuple(self.weight_shape)}, transposed={self.transposed}, format={self.format.name}"

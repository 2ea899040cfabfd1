"""OwnedParameter: a parameter that a module's own code multiplies with, whose owner updates it: experts of a mixture.

Backward adds the gradient of the parameter to `gradient_sum`, as `owned_linear.OwnedLinear` does.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from relora_ds.lowrank.owned_layer import OwnedLayer
from relora_ds.lowrank.taps import add_gradient


class OwnedParameter(OwnedLayer):
    """A parameter `[..., rows, columns]` with a `weight` that its owner updates.

    Calling it gives the weight in the precision of the input: the stored one itself, where it is stored in that. What
    ZeRO-3 gathers stays in memory as long as the module's code has it, from forward to backward.
    """

    def __init__(self, weight_shape: torch.Size, weight: nn.Parameter, *, transposed: bool = False):
        super().__init__(weight_shape, weight, transposed=transposed, is_parameter=True)
        self._anchor = torch.zeros((), requires_grad=True)

    @property
    def example(self) -> Tensor:
        """A tensor of the precision that computes, for a reader without an input."""
        return self.weight if self.weight.is_floating_point() else self._anchor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight in the shape of the plain parameter, and `x`; see `lowrank.attribute`."""
        value = self.format.dequantize(self.weight, self.weight_shape, x.dtype)
        return _Whole.apply(value, self.transposed, self.gradient_sum, self._anchor), x


class _Whole(torch.autograd.Function):
    """Autograd node of W. anchor: needs a gradient, so that there is a backward."""

    @staticmethod
    def forward(ctx, value, transposed, gradient_sum, anchor):
        ctx.transposed, ctx.gradient_sum = transposed, gradient_sum
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, None, None, add_gradient(ctx.gradient_sum, grad.mT if ctx.transposed else grad)

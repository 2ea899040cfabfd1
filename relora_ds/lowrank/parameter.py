"""Low-rank updates for a parameter that a module's own code multiplies with: the experts of a mixture.

The attribute that the code reads gives `W + s·B·A`, made once for each forward (`lowrank.attribute`).

That dense sum costs memory: beside the frozen weight, a tensor of its size in the precision that computes stays from a
layer's forward to its backward (to the end of its forward, where activations are checkpointed in full), and backward
makes a gradient of the same size for as long as it takes to reduce it to those of A and B.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.kernels import updated
from relora_ds.lowrank.taps import add_gradient


class ReLoRAParameter(LowRankLayer):
    """A frozen parameter `[..., rows, columns]` with factors of its own for each of its matrices.

    Calling it gives `W + s·B·A`, in the precision of the factors; with `decay`, `ρ·W + s·B·A`.
    """

    def __init__(self, weight_shape: torch.Size, weight: nn.Parameter | None, **options):
        super().__init__(weight_shape, weight, is_parameter=True, **options)
        self._anchor = torch.zeros((), requires_grad=True)

    @property
    def example(self) -> Tensor:
        """A tensor of the precision that computes, for a reader without an input."""
        return self.lora_A

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `W + s·B·A`, of the shape of the plain parameter, and `x`; see `lowrank.attribute`."""
        dense = None
        if self.weight is not None:
            dense = self.format.dequantize(self.weight, self.weight_shape, self.lora_A.dtype)
        options = self.scaling, self.transposed, self.decay, self.gradient_sum, self._anchor
        return _Sum.apply(dense, self.lora_A, self.lora_B, *options), x


class _Sum(torch.autograd.Function):
    """Autograd node of `ρ·W + s·B·A` (transposed: `ρ·W + s·AᵀBᵀ`). anchor: see `lowrank.taps`."""

    @staticmethod
    def forward(ctx, dense, lora_A, lora_B, scaling, transposed, decay, gradient_sum, anchor):
        ctx.save_for_backward(lora_A, lora_B)
        ctx.scaling, ctx.transposed, ctx.gradient_sum = scaling, transposed, gradient_sum
        return updated(lora_A, lora_B, dense, scaling, transposed, decay)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        lora_A, lora_B = ctx.saved_tensors
        grad = grad.mT if ctx.transposed else grad
        grad_anchor = add_gradient(ctx.gradient_sum, grad)
        grad_A = (lora_B.mT @ grad).mul_(ctx.scaling) if ctx.needs_input_grad[1] else None
        grad_B = (grad @ lora_A.mT).mul_(ctx.scaling) if ctx.needs_input_grad[2] else None
        return None, grad_A, grad_B, None, None, None, None, grad_anchor

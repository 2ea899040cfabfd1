"""The fused low-rank linear: one autograd node for `y = x Wᵀ + s (x Aᵀ) Bᵀ + b`.

Written as three separate matmuls, autograd would keep the low-rank product at the width of `y`,
add it in a pass of its own, and (for a weight that needs no gradient) still save `x` twice.
Here the low-rank part is accumulated into the dense product by `addmm`, forward and backward,
and only `x` and `h = x Aᵀ` are kept. Nothing of the size of `W` is ever made.
"""

import torch
from torch import Tensor


class LowRankLinearFunction(torch.autograd.Function):
    """Autograd node of `lowrank_linear`; gradients flow to `x`, `lora_A`, `lora_B` and `bias`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
                scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = rows @ lora_A.t()
        if weight is None:
            y = (h * scaling) @ lora_B.t()
        else:
            y = rows @ weight.t()
            y.addmm_(h, lora_B.t(), alpha=scaling)
        if bias is not None:
            y += bias
        ctx.save_for_backward(rows, h, weight, lora_A, lora_B)
        ctx.scaling = scaling
        ctx.x_shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        rows, h, weight, lora_A, lora_B = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, needs_bias, _ = ctx.needs_input_grad
        g = grad_y.reshape(-1, grad_y.shape[-1])

        grad_x = grad_A = grad_B = grad_bias = None
        if needs_x or needs_A:
            # s·g·B once, at width r: both the input's and A's gradient start from it.
            gB = (g @ lora_B).mul_(ctx.scaling)
            if needs_A:
                grad_A = gB.t() @ rows
            if needs_x:
                if weight is None:
                    grad_x = gB @ lora_A
                else:
                    grad_x = g @ weight
                    grad_x.addmm_(gB, lora_A)
                grad_x = grad_x.view(ctx.x_shape)
        if needs_B:
            grad_B = (g.t() @ h).mul_(ctx.scaling)
        if needs_bias:
            grad_bias = g.sum(0)
        return grad_x, None, grad_A, grad_B, grad_bias, None


def lowrank_linear(x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
                   scaling: float) -> Tensor:
    """`x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias` (paper Eq. 2), fused.

    Args:
        x: `[..., in_features]`.
        weight: frozen `[out_features, in_features]`, or None for the paper's LoRA baseline (no base).
        lora_A: `[r, in_features]`.
        lora_B: `[out_features, r]`.
        bias: `[out_features]` or None.
        scaling: `s = lora_alpha / r`.

    Returns:
        `[..., out_features]`, of the dtype of `x`. All tensors share one dtype.
    """
    return LowRankLinearFunction.apply(x, weight, lora_A, lora_B, bias, scaling)

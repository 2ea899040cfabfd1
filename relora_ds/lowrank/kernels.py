"""The fused low-rank linear: one autograd node for `y = x Wᵀ + s (x Aᵀ) Bᵀ + b`.

Written as three separate matmuls, autograd would keep the low-rank product at the width of `y`,
add it in a pass of its own, and (for a weight that needs no gradient) still save `x` twice.
Here the low-rank part is accumulated into the dense product by `addmm`, forward and backward,
and only `x` and `h = x Aᵀ` are kept. Nothing of the size of `W` is ever made where W is dense; of a packed
W (`lowrank.formats`) one dense copy lives for the length of one product, in forward and again in backward.

The products are operators of their own (`torch.ops.relora_ds`). So activation checkpointing can tell the large one of
forward, which it keeps, from the small one, which it repeats; `torch.compile` cannot move a dequantized weight from
forward to backward; and what they need inside (fp32 copies, where a CPU multiplies 16 bit slowly) is in no trace. Where
nothing looks at operators their kernels are called directly: six trips through PyTorch's dispatcher into Python took a
layer 0.1 ms, as long as its products in a small network.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd.function import once_differentiable

from relora_ds.lowrank.formats import DENSE, Format, format_named
from relora_ds.lowrank.reinit import GradientTap

_library = torch.library.Library("relora_ds", "DEF")
_library.define("product(Tensor a, Tensor b) -> Tensor")
_library.define(
    "linear(Tensor rows, Tensor? weight, Tensor? h, Tensor lora_B, Tensor? bias, float scaling, "
    "str format, SymInt[]? shape=None) -> Tensor"
)
_library.define("linear_input_grad(Tensor g, Tensor? weight, Tensor? gB, Tensor lora_A, str format) -> Tensor")


# 16-bit dtypes that this machine's CPU has no units for.
SLOW_ON_CPU = {
    dtype
    for dtype, supported in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    )
    if not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, supported)())
}


def _in_fp32_where_16_bit_is_slow(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without such units torch's products are slow: 8 (x Wᵀ) to 100 times (g W) fp32's time (bf16, AVX2, torch 2.13).

    So operands are widened for the length of the kernel, and the result is rounded once.
    """

    @functools.wraps(kernel)
    def widened(first: Tensor, *others) -> Tensor:
        dtype = first.dtype
        if first.device.type != "cpu" or dtype not in SLOW_ON_CPU:
            return kernel(first, *others)
        wide = [t.float() if isinstance(t, Tensor) and t.dtype == dtype else t for t in others]
        return kernel(first.float(), *wide).to(dtype)

    return widened


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _linear(
    rows: Tensor,
    weight: Tensor | None,
    h: Tensor | None,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    format: str,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Compute `rows Wᵀ + s h Bᵀ + b`; without W or without h, leave that term out.

    shape: of the result, `[..., out]`; None for `[n, out]`. The result gets it in place, because autograd refuses
        in-place operations (a model's `+=`, `ReLU(inplace=True)`) on a view that a Function returns.
    """
    if weight is None:
        assert h is not None
        y = (h * scaling) @ lora_B.t()
    else:
        y = format_named(format).multiply(rows, weight, torch.Size([lora_B.shape[0], rows.shape[1]]))
        if h is not None:
            y.addmm_(h, lora_B.t(), alpha=scaling)
    if bias is not None:
        y += bias
    return y if shape is None else y.resize_(shape)


def _linear_input_grad(g: Tensor, weight: Tensor | None, gB: Tensor | None, lora_A: Tensor, format: str) -> Tensor:
    """`g W + gB A`, with `gB = s g B`."""
    if weight is None:
        assert gB is not None
        return gB @ lora_A
    grad = format_named(format).multiply_transposed(g, weight, torch.Size([g.shape[1], lora_A.shape[1]]))
    return grad if gB is None else grad.addmm_(gB, lora_A)


def _operator(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register the kernel; returns what calls it, through the dispatcher only where a trace or a mode is to see it."""
    kernel, operator = _in_fp32_where_16_bit_is_slow(kernel), getattr(torch.ops.relora_ds, name)
    _library.impl(name, kernel, "CompositeExplicitAutograd")

    def call(*arguments) -> Tensor:
        is_watched = torch.compiler.is_compiling() or _len_torch_dispatch_stack()
        return (operator if is_watched else kernel)(*arguments)

    return call


product = _operator("product", _product)
linear = _operator("linear", _linear)
linear_input_grad = _operator("linear_input_grad", _linear_input_grad)
torch.library.register_fake("relora_ds::product", lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
torch.library.register_fake(
    "relora_ds::linear",
    lambda rows, weight, h, lora_B, bias, scaling, format, shape=None: rows.new_empty(
        (rows.shape[0], lora_B.shape[0]) if shape is None else shape
    ),
)
torch.library.register_fake(
    "relora_ds::linear_input_grad", lambda g, weight, gB, lora_A, format: g.new_empty(g.shape[0], lora_A.shape[1])
)


def _shape_of_result(x: Tensor, lora_B: Tensor) -> tuple[int, ...] | None:
    """Return the `shape` that `linear` takes for an input `[..., in]`."""
    return None if x.ndim == 2 else (*x.shape[:-1], lora_B.shape[0])


class LowRankLinearFunction(torch.autograd.Function):
    """Autograd node of `lowrank_linear`; gradients flow to `x`, `lora_A`, `lora_B` and `bias`."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        format: str,
        sketch: GradientTap | None,
    ) -> Tensor:
        # Detached, so that backward refuses an input changed in between with autograd's usual message.
        rows = x.detach().reshape(-1, x.shape[-1])
        h = product(rows, lora_A.t())
        y = linear(rows, weight, h, lora_B, bias, scaling, format, _shape_of_result(x, lora_B))
        ctx.save_for_backward(rows, h, weight, lora_A, lora_B)
        ctx.scaling, ctx.format, ctx.sketch = scaling, format, sketch
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        rows, h, weight, lora_A, lora_B = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        g = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.sketch is not None:
            ctx.sketch.add(g, rows)

        grad_x = grad_A = grad_B = grad_bias = None
        if needs_x or needs_A:
            # s·g·B once, at width r: both the input's and A's gradient start from it.
            gB = product(g, lora_B).mul_(ctx.scaling)
            if needs_A:
                grad_A = product(gB.t(), rows)
            if needs_x:
                grad_x = linear_input_grad(g, weight, gB, lora_A, ctx.format).view(ctx.x_shape)
        if needs_B:
            grad_B = product(g.t(), h).mul_(ctx.scaling)
        if needs_bias:
            grad_bias = g.sum(0)
        return grad_x, None, grad_A, grad_B, grad_bias, None, None, None


class FrozenLinearFunction(torch.autograd.Function):
    """Autograd node of `x Wᵀ` for a frozen W of any format; `lora_A` and `lora_B` only tell its shape."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, format: str) -> Tensor:
        y = linear(x.reshape(-1, x.shape[-1]), weight, None, lora_B, None, 1.0, format, _shape_of_result(x, lora_B))
        ctx.save_for_backward(weight, lora_A)
        ctx.format, ctx.x_shape = format, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        weight, lora_A = ctx.saved_tensors
        g = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = linear_input_grad(g, weight, None, lora_A, ctx.format)
        return grad_x.view(ctx.x_shape), None, None, None, None


def lowrank_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    format: Format = DENSE,
    sketch: GradientTap | None = None,
) -> Tensor:
    """`x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias` (paper Eq. 2), fused.

    Args:
        x: `[..., in_features]`.
        weight: frozen, as `format` stores it; or None for the paper's LoRA baseline (no base).
        lora_A: `[r, in_features]`.
        lora_B: `[out_features, r]`.
        bias: `[out_features]` or None.
        scaling: `s = lora_alpha / r`.
        sketch: takes W's gradient along in backward.

    Returns:
        `[..., out_features]`, of the dtype of `x`. All tensors but a packed weight share one dtype.
    """
    return LowRankLinearFunction.apply(x, weight, lora_A, lora_B, bias, scaling, format.name, sketch)

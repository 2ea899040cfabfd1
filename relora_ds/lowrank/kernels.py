"""The fused low-rank linear: one autograd node for `y = ρ x Wᵀ + s (x Aᵀ) Bᵀ + b`.

Written as three separate matmuls, autograd would keep the low-rank product at the width of `y`,
add it in a pass of its own, and (for a weight that needs no gradient) still save `x` twice.
Here only what gradients need is kept: `h = x Aᵀ` for that of B, and `x` where A trains too. There are two ways to
multiply, forward and in backward for the gradient of `x`:

    separate    the low-rank part is a side branch, accumulated into the dense product by `addmm`. Nothing of the size
                of W is made where W is dense; of a packed W (`lowrank.formats`) one dense copy lives for one product.
    folded      `ρ W + s B A` is formed, multiplies, and is gone. Fewer FLOPs for many rows (`lowrank.folding`).

ρ, 1 if not given, is how much weight decay has left of W since W was last written.

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

from relora_ds.lowrank.base_format import Format
from relora_ds.lowrank.formats import DENSE, format_named
from relora_ds.lowrank.reinit import GradientTap
from relora_ds.lowrank.taps import add_products

_library = torch.library.Library("relora_ds", "DEF")
_library.define("product(Tensor a, Tensor b) -> Tensor")
_library.define(
    "linear(Tensor rows, Tensor? weight, Tensor? h, Tensor lora_B, Tensor? bias, float scaling, "
    "str format, SymInt[]? shape=None, Tensor? lora_A=None, Tensor? decay=None) -> Tensor"
)
_library.define(
    "linear_input_grad(Tensor g, Tensor? weight, Tensor? gB, Tensor lora_A, str format, "
    "Tensor? lora_B=None, float scaling=1.0, Tensor? decay=None) -> Tensor"
)
_library.define(
    "updated(Tensor lora_A, Tensor lora_B, Tensor? dense, float scaling, bool transposed, Tensor? decay) -> Tensor"
)


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


def folded_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, format: Format, decay: Tensor | None = None
) -> Tensor:
    """Return `ρ W + s B A`, `[out, in]`, a new tensor of the dtype of the factors. weight: as `format` stores it."""
    dense = format.dequantize(weight, torch.Size([lora_B.shape[0], lora_A.shape[1]]), lora_A.dtype)
    shares_storage = dense.untyped_storage()._cdata == weight.untyped_storage()._cdata
    into = dense.clone() if shares_storage else dense
    return into.addmm_(lora_B, lora_A, alpha=scaling, beta=_rho(decay))


def _rho(decay: Tensor | None) -> float:
    """Return ρ. It is a factor of the products themselves, before they are rounded.

    A 16-bit tensor times 0.998 is the same tensor again: none of its numbers has another one so near.
    """
    return 1.0 if decay is None else float(decay)


def _linear(
    rows: Tensor,
    weight: Tensor | None,
    h: Tensor | None,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    format: str,
    shape: Sequence[int] | None = None,
    lora_A: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Compute `ρ rows Wᵀ + s h Bᵀ + b`; without W or without h, leave that term out.

    shape: of the result, `[..., out]`; None for `[n, out]`. The result gets it in place, because autograd refuses
        in-place operations (a model's `+=`, `ReLU(inplace=True)`) on a view that a Function returns.
    lora_A: instead of h; folds `s B A` into W.
    """
    if weight is None:
        assert h is not None
        y = (h * scaling) @ lora_B.t()
    elif lora_A is not None:
        y = rows @ folded_weight(weight, lora_A, lora_B, scaling, format_named(format), decay).t()
    else:
        y = format_named(format).multiply(rows, weight, torch.Size([lora_B.shape[0], rows.shape[1]]), _rho(decay))
        if h is not None:
            y.addmm_(h, lora_B.t(), alpha=scaling)
    if bias is not None:
        y += bias
    return y if shape is None else y.resize_(shape)


def _linear_input_grad(
    g: Tensor,
    weight: Tensor | None,
    gB: Tensor | None,
    lora_A: Tensor,
    format: str,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    decay: Tensor | None = None,
) -> Tensor:
    """`ρ g W + gB A`, with `gB = s g B`. lora_B: instead of gB; folds `s B A` into W."""
    if weight is None:
        assert gB is not None
        return gB @ lora_A
    if lora_B is not None:
        return g @ folded_weight(weight, lora_A, lora_B, scaling, format_named(format), decay)
    shape = torch.Size([g.shape[1], lora_A.shape[1]])
    grad = format_named(format).multiply_transposed(g, weight, shape, _rho(decay))
    return grad if gB is None else grad.addmm_(gB, lora_A)


def _updated(
    lora_A: Tensor, lora_B: Tensor, dense: Tensor | None, scaling: float, transposed: bool, decay: Tensor | None
) -> Tensor:
    """Compute `ρ W + s B A`, or without W `s B A`, of experts, `[..., out, in]`; transposed: `[..., in, out]`."""
    first, second = (lora_A.mT, lora_B.mT) if transposed else (lora_B, lora_A)
    if dense is None:
        return (first @ second).mul_(scaling)
    added = torch.addmm if dense.ndim == 2 else torch.baddbmm
    return added(dense, first, second, alpha=scaling, beta=_rho(decay))


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
updated = _operator("updated", _updated)
torch.library.register_fake("relora_ds::product", lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
torch.library.register_fake(
    "relora_ds::linear",
    lambda rows, weight, h, lora_B, bias, scaling, format, shape=None, lora_A=None, decay=None: rows.new_empty(
        (rows.shape[0], lora_B.shape[0]) if shape is None else shape
    ),
)
torch.library.register_fake(
    "relora_ds::linear_input_grad",
    lambda g, weight, gB, lora_A, format, lora_B=None, scaling=1.0, decay=None: g.new_empty(
        g.shape[0], lora_A.shape[1]
    ),
)
torch.library.register_fake(
    "relora_ds::updated",
    lambda lora_A, lora_B, dense, scaling, transposed, decay: lora_A.new_empty(
        *lora_A.shape[:-2],
        *((lora_A.shape[-1], lora_B.shape[-2]) if transposed else (lora_B.shape[-2], lora_A.shape[-1])),
    ),
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
        taps: tuple[GradientTap, ...],
        decay: Tensor | None,
        folded: bool,
    ) -> Tensor:
        # Detached, so that backward refuses an input changed in between with autograd's usual message.
        rows = x.detach().reshape(-1, x.shape[-1])
        h = product(rows, lora_A.t())
        given, folds = (None, lora_A) if folded else (h, None)
        y = linear(rows, weight, given, lora_B, bias, scaling, format, _shape_of_result(x, lora_B), folds, decay)
        keeps_rows = ctx.needs_input_grad[2] or len(taps) > 0
        ctx.save_for_backward(rows if keeps_rows else None, h, weight, lora_A, lora_B, decay)
        ctx.scaling, ctx.format, ctx.taps, ctx.folded = scaling, format, taps, folded
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        rows, h, weight, lora_A, lora_B, decay = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        g = grad_y.reshape(-1, grad_y.shape[-1])
        g, _ = add_products(ctx.taps, g, rows)

        grad_x = grad_A = grad_B = grad_bias = gB = None
        if needs_A or (needs_x and not ctx.folded):
            # s·g·B once, at width r: A's gradient starts from it, and the input's where nothing is folded.
            gB = product(g, lora_B).mul_(ctx.scaling)
            if needs_A:
                grad_A = product(gB.t(), rows)
        if needs_x:
            given, folds = (None, lora_B) if ctx.folded else (gB, None)
            grad_x = linear_input_grad(g, weight, given, lora_A, ctx.format, folds, ctx.scaling, decay)
            grad_x = grad_x.view(ctx.x_shape)
        if needs_B:
            grad_B = product(g.t(), h).mul_(ctx.scaling)
        if needs_bias:
            grad_bias = g.sum(0)
        return grad_x, None, grad_A, grad_B, grad_bias, None, None, None, None, None


class FrozenLinearFunction(torch.autograd.Function):
    """Autograd node of `ρ x Wᵀ + b` for a W of any format that autograd does not train.

    `lora_A [..., in]` and `lora_B [out, ...]` only tell its shape. anchor: needs a gradient, so that there is a
    backward, for the taps, where x needs none. It gets none, or a zero (`lowrank.taps`).
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        format: str,
        decay: Tensor | None,
        bias: Tensor | None,
        taps: tuple[GradientTap, ...],
        anchor: Tensor | None,
    ) -> Tensor:
        rows, shape = x.detach().reshape(-1, x.shape[-1]), _shape_of_result(x, lora_B)
        y = linear(rows, weight, None, lora_B, bias, 1.0, format, shape, None, decay)
        ctx.save_for_backward(rows if taps else None, weight, lora_A, decay)
        ctx.format, ctx.x_shape, ctx.taps = format, x.shape, taps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        rows, weight, lora_A, decay = ctx.saved_tensors
        g = grad_y.reshape(-1, grad_y.shape[-1])
        g, grad_anchor = add_products(ctx.taps, g, rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear_input_grad(g, weight, None, lora_A, ctx.format, None, 1.0, decay).view(ctx.x_shape)
        grad_bias = g.sum(0) if ctx.needs_input_grad[6] else None
        return grad_x, None, None, None, None, None, grad_bias, None, grad_anchor


def lowrank_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    format: Format = DENSE,
    taps: tuple[GradientTap, ...] = (),
    decay: Tensor | None = None,
    folded: bool = False,
) -> Tensor:
    """`ρ x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias` (paper Eq. 2), fused.

    Args:
        x: `[..., in_features]`.
        weight: frozen, as `format` stores it; or None for the paper's LoRA baseline (no base).
        lora_A: `[r, in_features]`. Where it needs no gradient, backward computes none and `x` is not kept for it.
        lora_B: `[out_features, r]`.
        bias: `[out_features]` or None.
        scaling: `s = lora_alpha / r`.
        taps: take W's gradient along in backward.
        decay: ρ, a tensor without dimensions on the CPU, wherever W is: its number is read without waiting for a
            device, and a compiled step takes other values without being compiled again. None for 1.
        folded: multiply with `ρ W + s B A` instead of with its parts; needs a weight.

    Returns:
        `[..., out_features]`, of the dtype of `x`. All tensors but a packed weight and `decay` share one dtype.
    """
    if folded and not torch.is_grad_enabled():  # nobody asks for x Aᵀ
        rows, shape = x.reshape(-1, x.shape[-1]), _shape_of_result(x, lora_B)
        return linear(rows, weight, None, lora_B, bias, scaling, format.name, shape, lora_A, decay)
    return LowRankLinearFunction.apply(x, weight, lora_A, lora_B, bias, scaling, format.name, taps, decay, folded)

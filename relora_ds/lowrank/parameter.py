"""Low-rank updates for a parameter that a module's own code multiplies with: the experts of a mixture.

Since transformers 5 the experts of a layer are one parameter `[experts, out, in]`, of which the module's code takes
slices, or which it gives to one grouped product. So there is no linear to replace. Instead the parameter becomes a
module, `ReLoRAParameter`, and the attribute that the code reads gives `W + s·B·A`, made once for each forward.

That dense sum costs memory: beside the frozen weight, a tensor of its size in the precision that computes stays from a
layer's forward to its backward (to the end of its forward, where activations are checkpointed in full), and backward
makes a gradient of the same size for as long as it takes to reduce it to those of A and B.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from relora_ds.lowrank.base_layer import LowRankLayer

_MADE = "_updated_parameters"  # the sums of the current forward, by name


class ReLoRAParameter(LowRankLayer):
    """A frozen parameter `[..., rows, columns]` with factors of its own for each of its matrices.

    Calling it gives `W + s·B·A`, in the precision of the factors; with `decay`, `ρ·W + s·B·A`.
    """

    def __init__(self, weight_shape: torch.Size, weight: nn.Parameter | None, **options):
        super().__init__(weight_shape, weight, is_parameter=True, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `W + s·B·A`, of the shape of the plain parameter, and `x`.

        x: the input of what reads the sum, for ZeRO-3 alone: it frees the weights that it gathered for a module's
            backward when backward has come to the module's inputs, so the module needs one that is used afterwards.
        """
        dense = None
        if self.weight is not None:
            dense = self.format.dequantize(self.weight, self.weight_shape, self.lora_A.dtype)
        options = self.scaling, self.transposed, self.decay, self.gradient_sum
        return _Sum.apply(dense, self.lora_A, self.lora_B, *options), x


class _Sum(torch.autograd.Function):
    """Autograd node of `ρ·W + s·B·A` (transposed: `ρ·W + s·AᵀBᵀ`)."""

    @staticmethod
    def forward(ctx, dense, lora_A, lora_B, scaling, transposed, decay, gradient_sum):
        ctx.save_for_backward(lora_A, lora_B)
        ctx.scaling, ctx.transposed, ctx.gradient_sum = scaling, transposed, gradient_sum
        first, second = (lora_A.mT, lora_B.mT) if transposed else (lora_B, lora_A)
        if dense is None:
            return (first @ second).mul_(scaling)
        added = torch.addmm if dense.ndim == 2 else torch.baddbmm
        return added(dense, first, second, alpha=scaling, beta=1.0 if decay is None else float(decay))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        lora_A, lora_B = ctx.saved_tensors
        grad = grad.mT if ctx.transposed else grad
        if ctx.gradient_sum is not None:
            ctx.gradient_sum.add_gradient(grad)
        grad_A = (lora_B.mT @ grad).mul_(ctx.scaling) if ctx.needs_input_grad[1] else None
        grad_B = (grad @ lora_A.mT).mul_(ctx.scaling) if ctx.needs_input_grad[2] else None
        return None, grad_A, grad_B, None, None, None, None


def install(module: nn.Module, leaf: str, layer: ReLoRAParameter) -> None:
    """Put `layer` in the place of the parameter `leaf` of `module`, whose code still reads the attribute."""
    delattr(module, leaf)
    module._modules[leaf] = layer
    _set_class(module)


def uninstall(module: nn.Module, leaf: str, weight: nn.Parameter) -> None:
    """Put a plain parameter back."""
    del module._modules[leaf]
    _set_class(module)
    module.register_parameter(leaf, weight)


def _set_class(module: nn.Module) -> None:
    """Give `module` the class whose attributes for its low-rank parameters are their sums; its own if it has none."""
    plain = getattr(type(module), "plain_class", type(module))
    leaves = tuple(leaf for leaf, part in module._modules.items() if isinstance(part, ReLoRAParameter))
    updating: Callable = _updating_class  # functools.cache takes classes for unhashable
    module.__class__ = updating(plain, leaves) if leaves else plain


@functools.cache
def _updating_class(plain: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    def forward(self, x, *args, **kwargs):
        made = {}
        for leaf in leaves:  # the same order in every forward: ZeRO-3 relies on it
            made[leaf], x = self._modules[leaf](x)
        self.__dict__[_MADE] = made
        try:
            return plain.forward(self, x, *args, **kwargs)
        finally:
            del self.__dict__[_MADE]

    def __reduce_ex__(self, protocol):  # pickle finds classes by name, and this one has the plain one's
        _, _, *state = plain.__reduce_ex__(self, protocol)
        return _new, (plain, leaves), *state

    members: dict = {leaf: property(functools.partial(_sum, leaf=leaf)) for leaf in leaves}
    about = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"forward": forward, "__reduce_ex__": __reduce_ex__, "plain_class": plain}
    return type(plain.__name__, (plain,), {**about, **members})


def _new(plain: type[nn.Module], leaves: tuple[str, ...]) -> nn.Module:
    """Return a module that is not initialised yet, for pickle and `copy.deepcopy`."""
    updating: Callable = _updating_class
    return plain.__new__(updating(plain, leaves))


def _sum(module: nn.Module, leaf: str) -> Tensor:
    made = module.__dict__.get(_MADE)
    layer: Any = module._modules[leaf]
    return layer(layer.lora_A)[0] if made is None else made[leaf]

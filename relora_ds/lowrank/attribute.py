"""Layers in the place of parameters that a module's own code multiplies with: the experts of a mixture.

Since transformers 5 the experts of a layer are one parameter `[experts, out, in]`, of which the module's code takes
slices, or which it gives to one grouped product. So there is no linear to replace. Instead the parameter becomes a
module, and the attribute that the code reads gives what this module makes, once for each forward.

Such a layer is called with the input x of what reads it, and returns the tensor to read and x. ZeRO-3 needs x: it frees
the weights that it gathered for a module's backward when backward has come to the module's inputs, so the module needs
one that is used afterwards.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from relora_ds.lowrank.owned_layer import OwnedLayer

_MADE = "_updated_parameters"  # what the layers have made for the current forward, by name


def install(module: nn.Module, leaf: str, layer: OwnedLayer) -> None:
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
    """Give `module` the class whose attributes are what its layers make; its own if it has none."""
    plain = getattr(type(module), "plain_class", type(module))
    leaves = tuple(leaf for leaf, part in module._modules.items() if isinstance(part, OwnedLayer) and part.is_parameter)
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

    members: dict = {leaf: property(functools.partial(_made, leaf=leaf)) for leaf in leaves}
    about = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"forward": forward, "__reduce_ex__": __reduce_ex__, "plain_class": plain}
    return type(plain.__name__, (plain,), {**about, **members})


def _new(plain: type[nn.Module], leaves: tuple[str, ...]) -> nn.Module:
    """Return a module that is not initialised yet, for pickle and `copy.deepcopy`."""
    updating: Callable = _updating_class
    return plain.__new__(updating(plain, leaves))


def _made(module: nn.Module, leaf: str) -> Tensor:
    made = module.__dict__.get(_MADE)
    layer: Any = module._modules[leaf]
    return layer(layer.example)[0] if made is None else made[leaf]

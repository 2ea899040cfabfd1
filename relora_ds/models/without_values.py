"""Models whose parameters have shapes and no values: they cost no memory, whatever their size."""

from collections.abc import Container, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_register_parameter = nn.Module.register_parameter


@contextmanager
def parameters_on_meta(keep: Container[int] = ()) -> Iterator[list[nn.Parameter]]:
    """Move every parameter to the meta device as soon as a module has it. Buffers are computed as ever.

    Parameters keep their identity, so that those which are tied in a constructor stay tied.

    Args:
        keep: those that keep their values, by their number in the order of registration.

    Yields:
        The parameters in this order; it fills while modules are built.
    """
    registered: list[nn.Parameter] = []

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        _register_parameter(module, name, parameter)
        if parameter is None or parameter.is_meta:
            return
        if len(registered) not in keep:
            meta = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, meta)
        registered.append(parameter)

    nn.Module.register_parameter = register
    try:
        yield registered
    finally:
        nn.Module.register_parameter = _register_parameter

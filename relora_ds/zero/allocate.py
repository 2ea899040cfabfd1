"""Storage for the parameters of an engine that have no values yet (`zero.fill` brings them)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from relora_ds.lowrank.wrap import full_shape, owned_layers
from relora_ds.zero.frozen_master import is_partitioned


def allocate(model: nn.Module, settings: dict, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter of `model` storage on `device`, in the dtype that computes; what it held is let go.

    At ZeRO-3 it is this rank's partition, and one whole parameter at a time. Floating-point buffers, which keep their
    values, become fp32; those of low-rank layers are as they shall be.

    Args:
        settings: DeepSpeed's, resolved.
    """
    for parameter in model.parameters():
        shape, own_dtype = full_shape(parameter), parameter.dtype
        _forget_partition(parameter)
        parameter.grad = None  # of a pass before training: it would count in the first step
        empty = torch.empty((), dtype=dtype if own_dtype.is_floating_point else own_dtype).expand(shape)
        if parameter.is_meta:
            replacement = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            vars(replacement).update(vars(parameter))
            torch.utils.swap_tensors(parameter, replacement)  # who holds the parameter holds it still
        else:
            parameter.data = empty
    stored = {id(buffer) for layer in owned_layers(model).values() for buffer in layer.buffers(recurse=False)}
    for buffer in model.buffers():
        if id(buffer) in stored:  # replicated frozen weights, which `FrozenWeights` has made
            continue
        buffer.data = buffer.data.to(device, torch.float32 if buffer.is_floating_point() else buffer.dtype).contiguous()
    if settings["zero_optimization"]["stage"] == 3:
        _Partitioned(module=model, config_dict_or_path=settings)
    else:
        for parameter in model.parameters():
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)


class _Partitioned(Init):
    """DeepSpeed's partitioning of a whole model, of parameters without values: nothing is broadcast."""

    def _convert_to_zero_parameters(self, parameters):
        for parameter in parameters:
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.local_device)
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()


@contextmanager
def nothing_broadcast() -> Iterator[None]:
    """Keep DeepSpeed from sending parameters that have no values yet."""
    broadcast = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda self: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = broadcast


def _forget_partition(parameter: nn.Parameter) -> None:
    """Take off what `deepspeed.zero.Init` put on a parameter."""
    if not is_partitioned(parameter):
        return
    for name, value in list(vars(parameter).items()):
        if name.startswith("ds_") or callable(value):
            delattr(parameter, name)

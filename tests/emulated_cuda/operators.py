"""Every operator that runs: its tensors must be on one device, and what it makes is there too."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.emulated_cuda import rules
from tests.emulated_cuda.memory import HOST, real_device, storage_id

_aten = torch.ops.aten
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique_dim", "_unique2"}


def _tensors(values: Iterable) -> Iterator[Tensor]:
    """Those among an operator's arguments, also in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Operators(TorchDispatchMode):
    """Checks and marks, on behalf of an `EmulatedCuda`."""

    def __init__(self, gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        if any(real_device(t) != HOST or type(t).__name__ == "FakeTensor" for t in tensors):
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            self._check_collective(func, args, tensors)
            return func(*args, **kwargs)
        if func.namespace == "relora_ds":  # its kernels are Python: look inside
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        device = self._check(func, args, kwargs, tensors)
        known = {storage_id(t) for t in tensors}
        result = func(*args, **kwargs)
        if device.type == "cuda":
            for tensor in _tensors((result,)):
                if storage_id(tensor) not in known:
                    self._gpu.memory.put(tensor, device)
        return result

    def _check(self, func, args: tuple, kwargs: dict, tensors: list[Tensor]) -> torch.device:
        """Check an operator and note what makes the host wait; returns the device of its result."""
        gpu, name = self._gpu, func._schema.name.split("::")[1]
        device = gpu.destination or rules.common_device(func, name, args, tensors, gpu.memory)
        if kwargs.get("generator") is not None:
            rules.check_generator(kwargs["generator"], device)
        if func is _aten.copy_.default and gpu.destination is None:
            gpu.note_copy(args[0], args[1], non_blocking=len(args) > 2 and args[2])
        elif device.type == "cuda":
            if name in _WAITING:
                gpu.syncs.note(name)
            elif name in rules.INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
                gpu.syncs.note("index by a mask")
            elif func is _aten._scaled_mm.default:
                rules.check_scaled_mm(func, args, kwargs)
        return device

    def _check_collective(self, func, args: tuple, tensors: list[Tensor]) -> None:
        gpu, group, name = self._gpu, rules.group_of(args), func._schema.name
        gpu.collectives[name] += 1
        if group is not None and group.group_name not in gpu.host_groups and not name.endswith("barrier"):
            rules.check_collective(name, tensors, gpu.current_device, gpu.memory)

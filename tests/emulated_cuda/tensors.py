"""What Python asks of tensors: where they are, that they move, that they are made somewhere.

Patches, and no TorchFunctionMode: autograd runs backward without it.
"""

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from tests.emulated_cuda.memory import HOST, real_device
from tests.emulated_cuda.patches import Patches
from tests.emulated_cuda.rules import DeviceError

_TO = ("device", "dtype", "non_blocking", "copy")
_real_to = torch._C.TensorBase.to


def patch(gpu, patches: Patches) -> None:
    """Have tensors answer as on a machine with GPUs."""
    asks = _Tensors(gpu)
    # The set is made from the functions themselves: before they are replaced.
    makers = {f.__name__ for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
    makers |= {name for name in dir(torch) if name.endswith("_like") and not name.startswith("_")}
    patches.set(
        Tensor,
        device=property(gpu.memory.device_of),
        is_cuda=property(lambda t: gpu.memory.device_of(t).type == "cuda"),
        is_cpu=property(lambda t: gpu.memory.device_of(t).type == "cpu"),
    )
    patches.wrap(
        Tensor,
        {
            "to": asks.to,
            "cuda": asks.cuda,
            "cpu": asks.cpu,
            "numpy": asks.numpy,
            "__array__": asks.numpy,
            "tolist": asks.tolist,
            "type": asks.type,
            "get_device": asks.get_device,
            "pin_memory": asks.pin_memory,
            "is_pinned": asks.is_pinned,
            "record_stream": lambda *_: None,
            "__deepcopy__": asks.deepcopy,
            "__setitem__": asks.setitem,
        },
    )
    patches.wrap(Tensor, dict.fromkeys([name for name in dir(Tensor) if name.startswith("new_")], asks.made))
    patches.wrap(torch, dict.fromkeys(makers, asks.made))


class _Tensors:
    """Handlers of functions: each gets the function that it replaces, and its arguments."""

    def __init__(self, gpu):
        self._gpu, self._memory = gpu, gpu.memory

    def to(self, function, tensor, *args, **kwargs):
        like = kwargs.pop("other", args[0] if args and isinstance(args[0], Tensor) else None)
        if like is not None:
            args = (self._memory.device_of(like), like.dtype, *args[1:])
        names = _TO[1:] if args and isinstance(args[0], torch.dtype) else _TO
        wanted = dict(zip(names, args, strict=False)) | kwargs
        return self._move(tensor, wanted.pop("device", None), **wanted)

    def cuda(self, function, tensor, device=None, non_blocking=False, **_):
        return self._move(tensor, "cuda" if device is None else device, non_blocking=non_blocking)

    def cpu(self, function, tensor, **_):
        return self._move(tensor, HOST)

    def _move(self, tensor: Tensor, device, dtype=None, non_blocking=False, copy=False, **memory_format) -> Tensor:
        here = self._memory.device_of(tensor)
        device, dtype = here if device is None else self._gpu.device(device), dtype or tensor.dtype
        if device == here or {device.type, here.type} - {"cpu", "cuda"}:
            return _real_to(
                tensor,
                device if real_device(tensor) != HOST or device.type == "meta" else None,
                dtype,
                copy=copy,
                **memory_format,
            )
        with self._gpu.making_on(device):
            moved = self._memory.put(_real_to(tensor, dtype, copy=True, **memory_format), device)
        if device == HOST and non_blocking:
            self._memory.pin(moved)  # as PyTorch does
        self._gpu.note_copy(moved, tensor, non_blocking)
        return moved

    def made(self, function, *args, device=None, pin_memory=False, **kwargs):
        """A function that makes a tensor somewhere."""
        if device is None or (device := self._gpu.device(device)).type not in ("cpu", "cuda"):
            made = function(*args, **kwargs) if device is None else function(*args, device=device, **kwargs)
        elif function.__name__ in ("as_tensor", "asarray"):  # may be somewhere already
            made = self._move(function(*args, **kwargs), device)
        else:
            with self._gpu.making_on(device):
                made = self._memory.put(function(*args, device=HOST, **kwargs), device)
            if device != HOST and function.__name__ in ("tensor", "new_tensor"):
                self._gpu.syncs.note("copy of pageable or blocking memory to the GPU")
        return self._memory.pin(made) if pin_memory else made

    def setitem(self, function, tensor, index, value):
        if isinstance(value, Tensor):
            return function(tensor, index, value)
        with self._gpu.making_on(self._memory.device_of(tensor)):  # a number is no copy from the host
            return function(tensor, index, value)

    def deepcopy(self, function, tensor, memo):
        return self._memory.put(function(tensor, memo), self._memory.device_of(tensor))

    def numpy(self, function, tensor, *args, **kwargs):
        if self._memory.device_of(tensor).type == "cuda":
            raise TypeError("can't convert cuda device type tensor to numpy. Use Tensor.cpu() first")
        return function(tensor, *args, **kwargs)

    def tolist(self, function, tensor):
        if self._memory.device_of(tensor).type == "cuda":
            self._gpu.syncs.note("tolist")
        return function(tensor)

    def type(self, function, tensor, *args, **kwargs):
        name = function(tensor, *args, **kwargs)
        if isinstance(name, str) and self._memory.device_of(tensor).type == "cuda":
            return name.replace("torch.", "torch.cuda.")
        return name

    def get_device(self, function, tensor):
        index = self._memory.device_of(tensor).index
        return -1 if index is None else index

    def pin_memory(self, function, tensor, *_):
        if self._memory.device_of(tensor).type == "cuda":
            raise DeviceError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        return tensor if self._memory.is_pinned(tensor) else self._memory.pin(tensor.clone())

    def is_pinned(self, function, tensor, *_):
        return self._memory.is_pinned(tensor)

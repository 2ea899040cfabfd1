"""Where a tensor pretends to be, and how many bytes are there: the mark is on its storage, which views share."""

import collections
import weakref

import torch
from torch import Tensor

HOST = torch.device("cpu")
_storage = torch._C.TensorBase.untyped_storage


def real_device(tensor: Tensor) -> torch.device:
    """The device that PyTorch knows, whatever the tensor pretends."""
    return torch._C.TensorBase.device.__get__(tensor)


def storage_id(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    return id(_storage(tensor))


class Memory:
    """The memory of the GPUs, and page-locked memory of the host.

    Attributes:
        live, peak: bytes by GPU.
        pinned: page-locked memory.
    """

    def __init__(self):
        self.live, self.peak = collections.Counter(), collections.Counter()
        self.pinned = PinnedMemory()

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is."""
        device = real_device(tensor)
        if device != HOST or tensor.layout != torch.strided:
            return device
        return getattr(_storage(tensor), "pretended", HOST)

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Declare that the tensor's storage is on `device`; returns the tensor."""
        if real_device(tensor) != HOST or tensor.layout != torch.strided or self.device_of(tensor) == device:
            return tensor
        storage = _storage(tensor)
        if hasattr(storage, "leave"):
            storage.leave()
        storage.pretended = device
        if device.type == "cuda":
            self._count(device.index, storage.nbytes())
            storage.leave = weakref.finalize(storage, self._count, device.index, -storage.nbytes())
            storage.leave.atexit = False
        return tensor

    def _count(self, index: int, size: int) -> None:
        self.live[index] += size
        self.peak[index] = max(self.peak[index], self.live[index])

    def reset_peak(self, index: int) -> None:
        """Let the peak begin again at what is alive."""
        self.peak[index] = self.live[index]

    def pin(self, tensor: Tensor) -> Tensor:
        """Declare that a new tensor on the host is in page-locked memory; returns it."""
        storage = _storage(tensor)
        storage.block = self.pinned.allocate(storage.nbytes())
        weakref.finalize(storage, self.pinned.free, storage.block).atexit = False
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor is in page-locked memory."""
        return hasattr(_storage(tensor), "block") or self.pinned.is_registered(tensor.data_ptr())


class PinnedMemory:
    """Page-locked memory as PyTorch's caching host allocator keeps it (ATen/core/CachingHostAllocator.h).

    A block has a power of two of bytes, and is kept for the next tensor of that size. What `cudaHostRegister` locks
    has the size that it has.

    Attributes:
        held: bytes that are page-locked.
        used: those of them that belong to tensors.
    """

    def __init__(self):
        self.held = self.used = 0
        self._free: collections.Counter[int] = collections.Counter()
        self._registered: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        """Bytes of the block that `size` bytes take."""
        block = 1 << max(0, size - 1).bit_length()
        if self._free[block]:
            self._free[block] -= 1
        else:
            self.held += block
        self.used += block
        return block

    def free(self, block: int) -> None:
        """Keep a block for later."""
        self._free[block] += 1
        self.used -= block

    def register(self, address: int, size: int) -> None:
        """Lock memory that was allocated elsewhere."""
        self._registered[address] = size
        self.held += size
        self.used += size

    def unregister(self, address: int) -> None:
        """Unlock it."""
        size = self._registered.pop(address)
        self.held -= size
        self.used -= size

    def is_registered(self, address: int) -> bool:
        """Whether memory at an address is locked by `register`."""
        return any(first <= address < first + size for first, size in self._registered.items())

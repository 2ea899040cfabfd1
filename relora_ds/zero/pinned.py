"""Host memory that is kept: for the fp32 masters of frozen weights, and for what a checkpoint is written from.

Copies between a GPU and the host are fast, and need not be waited for, where the host's pages are locked. PyTorch's
`pin_memory()` rounds each block up to a power of two and never gives it back, which would cost the masters of a model a
third more than their 4 bytes a weight. So a block here is mapped for itself and registered with CUDA: exact to the
page, and gone with the last tensor that lies in it.
"""

import mmap
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_PADDING = 1024  # elements, at most, that ZeRO leaves between two neighbours

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every CUDA context


def host_block(numel: int, *, pinned: bool) -> Tensor:
    """Return an fp32 tensor `[numel]` of zeros in own host memory. pinned: page-locked for the current CUDA device.

    Raises:
        RuntimeError: CUDA cannot lock so much memory.
    """
    if not numel:
        return torch.empty(0)
    memory = _Memory(-1, 4 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = torch.frombuffer(memory, dtype=torch.float32)
    if pinned:
        memory.lock(block.data_ptr())
    return block


def pin_memory(address: int, size: int) -> None:
    """Page-lock `size` bytes. RuntimeError: see `host_block`."""
    if error := int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE)):
        raise RuntimeError(
            f"{size:,} bytes of host memory cannot be page-locked (cudaError {error}); allow more with "
            "ulimit -l, or keep the masters on the GPU with frozen_master=device"
        )


def unpin_memory(address: int) -> None:
    """Unlock what `pin_memory` has locked."""
    error = int(torch.cuda.cudart().cudaHostUnregister(address))
    assert not error, f"cudaError {error}"


class _Memory(mmap.mmap):
    """Anonymous memory; unlocked before it is unmapped."""

    _address: int | None = None

    def lock(self, address: int) -> None:
        # A child (a DataLoader's worker) would get a copy of all that is locked, and what the parent then writes could
        # move away from where the GPU looks for it.
        self.madvise(mmap.MADV_DONTFORK)
        pin_memory(address, len(self))
        self._address, self._device = address, torch.cuda.current_device()

    def __del__(self):
        if self._address is not None and not sys.is_finalizing():
            with torch.cuda.device(self._device):  # whichever thread this is in: no context on another GPU
                unpin_memory(self._address)


@dataclass(frozen=True)
class Lazy:
    """An fp32 tensor `[numel]` that is made only to be copied."""

    numel: int
    make: Callable[[], Tensor]


class HostCopies:
    """fp32 copies on the host, in one block that is used again for the next ones.

    Args:
        pinned: page-locked, for copies from CUDA.
    """

    def __init__(self, *, pinned: bool):
        self._pinned, self._block = pinned, torch.empty(0)

    def take(self, tensors: Mapping[str, Tensor | Lazy]) -> dict[str, Tensor]:
        """Return copies of contiguous 1-D fp32 tensors, which stay as they are until the next call.

        Views that lie side by side, as those of ZeRO's flat partitions do, are copied at once; what has to be made
        first, one after the other.
        """
        views = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        made = {name: value for name, value in tensors.items() if isinstance(value, Lazy)}
        stretches = _stretches(views)
        sizes = [stretch.numel() for stretch, _ in stretches] + [value.numel for value in made.values()]
        total = sum(sizes)
        if self._block.numel() < total:
            self._block = host_block(total, pinned=self._pinned)
        places = self._block[:total].split(sizes)
        found: dict[str, Tensor] = {}
        devices = {stretch.device for stretch, _ in stretches}
        for (stretch, names), copy in zip(stretches, places[: len(stretches)], strict=True):
            copy.copy_(stretch, non_blocking=True)
            for name in names:
                at = views[name].storage_offset() - stretch.storage_offset()
                found[name] = copy[at : at + views[name].numel()]
        for (name, lazy), copy in zip(made.items(), places[len(stretches) :], strict=True):
            tensor = lazy.make()
            devices.add(tensor.device)
            found[name] = copy.copy_(tensor, non_blocking=True)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return {name: found[name] for name in tensors}


def _stretches(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, list[str]]]:
    """Return views of all that the tensors cover, padding between neighbours included, with the names in each."""
    found: list[tuple[Tensor, list[str]]] = []
    address = stop = -1
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        assert tensor.dtype == torch.float32 and tensor.dim() == 1 and tensor.is_contiguous()
        storage, start = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
        if storage == address and start - stop <= _PADDING:
            first, names = found.pop()
            start, names = int(first.storage_offset()), [*names, name]
        else:
            names = [name]
        address, stop = storage, int(tensor.storage_offset()) + tensor.numel()
        found.append((tensor.as_strided((stop - start,), (1,), start), names))
    return found


class MasterStore(Mapping[str, Tensor]):
    """fp32 tensors of fixed shapes, one after the other in one block. Reading an item gives the tensor itself.

    What `hold` returned does not change while anybody refers to it: a new value then goes to a second block, and the
    first one is gone with the last reference.

    Args:
        shapes: by name.
        device: that they are kept on.
        pinned: on the host, page-locked: copies to and from CUDA are not waited for, except by those who look at the
            tensors on the host.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device, *, pinned: bool = False):
        self._shapes, self._device, self._pinned = dict(shapes), device, pinned
        self._values = self._new_block()
        self._next: dict[str, Tensor] = {}  # places in a second block
        self._held: dict[str, list[weakref.ref]] = {}
        self._stream: torch.cuda.Stream | None = None  # with copies that nobody has waited for
        self._left: list[Tensor] = []  # tensors that such a copy may still read

    def __getitem__(self, name: str) -> Tensor:
        self.settle()
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def put(self, name: str, value: Tensor) -> None:
        """Make a copy of `value` the tensor of this name."""
        self._copies_with(value.device)
        if any(reference() is not None for reference in self._held.pop(name, ())):
            if name not in self._next:
                self._next = self._new_block()
            self._left.append(self._values[name])
            self._values[name] = self._next.pop(name)
        self._values[name].copy_(value, non_blocking=True)
        if self._stream is None:
            self._left.clear()

    def read(self, name: str, device: torch.device) -> Tensor:
        """Return a copy on `device`."""
        self._copies_with(device)
        return self._values[name].to(device, copy=True, non_blocking=device.type == "cuda")

    def hold(self) -> dict[str, Tensor]:
        """All tensors as they are now, for as long as they are referred to."""
        found = {name: value.detach() for name, value in self.items()}
        for name, value in found.items():
            self._held.setdefault(name, []).append(weakref.ref(value))
        return found

    def settle(self) -> None:
        """Wait for the copies that are under way."""
        if self._stream is not None:
            self._stream.synchronize()
            self._stream = None
        self._left.clear()

    def _copies_with(self, device: torch.device) -> None:
        if device.type == "cpu":
            self.settle()
        elif self._device.type == "cpu":
            self._stream = torch.cuda.current_stream(device)

    def _new_block(self) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self._shapes.values()]
        block = (
            host_block(sum(sizes), pinned=self._pinned)
            if self._device.type == "cpu"
            else torch.empty(sum(sizes), device=self._device)
        )
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self._shapes.items(), block.split(sizes), strict=True)
        }

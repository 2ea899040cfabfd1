"""What CUDA and NCCL demand. Two rules are stricter: a list of tensors, and the operators in `_NO_HOST_SCALARS`,
take no 0-dim tensor of the host.
"""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.emulated_cuda.memory import HOST, Memory

_aten = torch.ops.aten
_CROSSING = {
    _aten.copy_.default,
    _aten._to_copy.default,
    _aten.set_.source_Tensor,
    _aten._has_compatible_shallow_copy_type.default,
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # indices may be on the host
_NO_HOST_SCALARS = (
    "cat",
    "stack",
    "_foreach",
    "_fused",
    "mm",
    "linear",
    "index_copy",
    "index_select",
    "gather",
    "scatter",
    "embedding",
)
_NCCL_DTYPES = {
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}


class DeviceError(RuntimeError):
    """What CUDA or NCCL would have raised."""


class GpuGenerator(torch.Generator):
    """A generator of a GPU: it draws as the host's do. PyTorch hands other objects for it to operators."""

    device = torch.device("cuda")
    known: "weakref.WeakValueDictionary[int, GpuGenerator]" = weakref.WeakValueDictionary()  # by address

    def __init__(self):
        self.known[self._cdata] = self


def common_device(func, name: str, args: tuple, tensors: list[Tensor], memory: Memory) -> torch.device:
    """The device that an operator's tensors are on.

    Raises:
        DeviceError: they are on several.
    """
    if func in _CROSSING:
        return memory.device_of(tensors[0])
    if name in INDEXING and memory.device_of(args[0]).type == "cuda":
        tensors = [args[0], *(value for value in args[2:] if isinstance(value, Tensor))]
    takes_lists = any(isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor) for a in args)
    strict = name.startswith(_NO_HOST_SCALARS) or (takes_lists and name not in INDEXING)
    found = {}
    for tensor in tensors:
        device = memory.device_of(tensor)
        if strict or tensor.dim() or device != HOST:
            found.setdefault(device, tensor)
    if len(found) > 1:
        raise DeviceError(
            f"Expected all tensors to be on the same device, but {func} got "
            f"{', '.join(f'{tuple(t.shape)} {t.dtype} on {device}' for device, t in found.items())}"
        )
    return next(iter(found), HOST)


def check_generator(generator: torch.Generator, device: torch.device) -> None:
    """A generator draws for its own kind of device."""
    kind = "cuda" if generator._cdata in GpuGenerator.known else "cpu"
    if kind != device.type:
        raise DeviceError(f"Expected a '{device.type}' device type for generator but found '{kind}'")


def check_collective(name: str, tensors: list[Tensor], current: torch.device, memory: Memory) -> None:
    """NCCL sends contiguous tensors of the current GPU, of the dtypes that it knows."""
    for tensor in tensors:
        what, device = f"NCCL: {name} of a tensor {tuple(tensor.shape)}", memory.device_of(tensor)
        if device.type == "cpu":
            raise DeviceError(f"{what} on the host: No backend type associated with device type cpu")
        if device != current:
            raise DeviceError(f"{what} on {device}; the current device is {current}")
        if tensor.dtype not in _NCCL_DTYPES:
            raise DeviceError(f"{what} of a dtype that it lacks, {tensor.dtype}")
        if not tensor.is_contiguous():
            raise DeviceError(f"{what} that is not contiguous, its strides are {tensor.stride()}")


def group_of(args: tuple) -> dist.ProcessGroup | None:
    """The process group among a collective's arguments."""
    objects = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
    return dist.ProcessGroup.unbox(objects[0]) if objects else None


def check_scaled_mm(func, args: tuple, kwargs: dict) -> None:
    """torch's own conditions, asked on fake CUDA tensors, and those of Hopper's kernel with a scale for each row."""
    names = [argument.name for argument in func._schema.arguments]
    named = dict(zip(names, args, strict=False)) | kwargs
    with FakeTensorMode():
        func(**{name: _fake(value) if isinstance(value, Tensor) else value for name, value in named.items()})
    operands, by_rows = (named["self"], named["mat2"]), named["scale_a"].numel() > 1
    if by_rows and named.get("out_dtype") != torch.bfloat16:
        raise DeviceError(f"_scaled_mm: with a scale for each row the result is bf16, not {named.get('out_dtype')}")
    if by_rows and any(operand.dtype == torch.float8_e5m2 for operand in operands):
        raise DeviceError("_scaled_mm: e5m2 has no scale for each row")
    if any(operand.storage_offset() * operand.element_size() % 16 for operand in operands):
        raise DeviceError("_scaled_mm: an operand does not begin at a multiple of 16 bytes")


def _fake(tensor: Tensor) -> Tensor:
    return torch._C._VariableFunctions.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

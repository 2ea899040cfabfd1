"""Partitions of ZeRO-3's parameters, and pieces of flattened tensors."""

from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn


def partition_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the half-open range of the flattened parameter in this rank's ZeRO-3 partition; the rest is padding."""
    partitioned: Any = parameter  # with DeepSpeed's attributes
    length = partitioned.ds_tensor.ds_numel
    start = min(partitioned.ds_numel, length * partitioned.ds_zero_partition_rank)
    return start, min(partitioned.ds_numel, start + length)


def write_partition(parameter: nn.Parameter, value: Tensor, start: int = 0) -> None:
    """Store this rank's part of `value`, which begins at element `start`, in a ZeRO-3 parameter, not gathered."""
    partitioned: Any = parameter  # with DeepSpeed's attributes
    assert partitioned.ds_status == ZeroParamStatus.NOT_AVAILABLE, "gathered: the edit would go unseen"
    first, stop = partition_range(parameter)
    copy_common(partitioned.ds_tensor.data[: stop - first], first, value.reshape(-1), start)


def copy_common(into: Tensor, into_start: int, piece: Tensor, start: int) -> None:
    """Copy what two 1-D pieces of one tensor have in common, of which each begins at an element of it."""
    first, stop = max(into_start, start), min(into_start + into.numel(), start + piece.numel())
    if first < stop:
        into[first - into_start : stop - into_start].copy_(piece[first - start : stop - start])

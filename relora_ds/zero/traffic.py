"""Exact bytes per collective, counted where they are sent: at torch.distributed's `c10d` operators.

DeepSpeed's own communication logger logs an all_gather at the size of a shard; counting below it gives
what really crosses the network. Two figures for each collective:

    payload   the size of the tensor that is reduced, gathered or scattered (whole, not per rank)
    wire      what one rank sends in a ring: 2(n-1)/n of the payload for an all_reduce, (n-1)/n for a gather,
              a scatter, a broadcast or a reduce

Counting intercepts every operator and costs time: switch it on for sampled steps.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def _one_way(n: int) -> float:
    return (n - 1) / n


def _both_ways(n: int) -> float:
    return 2 * (n - 1) / n


# operator -> (name, index of the argument whose size is the payload, wire bytes per payload byte at n ranks)
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0, _both_ways),
    "allreduce_coalesced_": ("all_reduce", 0, _both_ways),
    "broadcast_": ("broadcast", 0, _one_way),
    "reduce_": ("reduce", 0, _one_way),
    "allgather_": ("all_gather", 0, _one_way),
    "_allgather_base_": ("all_gather", 0, _one_way),
    "allgather_coalesced_": ("all_gather", 0, _one_way),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, _one_way),
    "reduce_scatter_": ("reduce_scatter", 1, _one_way),
    "_reduce_scatter_base_": ("reduce_scatter", 1, _one_way),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, _one_way),
    "gather_": ("gather", 0, _one_way),
    "scatter_": ("scatter", 1, _one_way),
    "alltoall_": ("all_to_all", 1, _one_way),
    "alltoall_base_": ("all_to_all", 1, _one_way),
    "send": ("send", 0, lambda n: 1.0),
    "recv_": ("recv", 0, lambda n: 0.0),
}
_SILENT = {"barrier", "monitored_barrier_", "recv_any_source_"}


@dataclass
class Traffic:
    """Bytes counted on one rank: `calls` holds (collective, payload bytes) in order."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    payload: int = 0
    wire: float = 0.0

    def by_collective(self, at_least: int = 0) -> dict[str, int]:
        """Payload bytes by collective, of the calls of `at_least` bytes."""
        totals: dict[str, int] = defaultdict(int)
        for name, size in self.calls:
            if size >= at_least:
                totals[name] += size
        return dict(totals)


class count_traffic(TorchDispatchMode):  # noqa: N801 (a context manager, used like a function)
    """`with count_traffic() as traffic:` counts the collectives that this process starts inside the block."""

    def __init__(self):
        super().__init__()
        self.traffic = Traffic()

    def __enter__(self) -> Traffic:
        super().__enter__()
        return self.traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple) -> None:
        if operator in _SILENT:
            return
        if operator not in _COLLECTIVES:
            raise NotImplementedError(f"traffic: unknown collective c10d::{operator}; it cannot be counted")
        name, argument, wire_factor = _COLLECTIVES[operator]
        size = _num_bytes(args[argument])
        self.traffic.calls.append((name, size))
        self.traffic.payload += size
        self.traffic.wire += size * wire_factor(dist.get_world_size())


def expected_step(stage: int, *, trainable: int, frozen_bytes: int, element_size: int, accumulation: int,
                  world_size: int, small_bytes: int = 0) -> tuple[float, float]:
    """`(payload, wire)` bytes of one optimizer step, padding and control messages left out.

    With T trainable elements of `e` bytes: stage 0 reduces eT once; stage 1 reduces and gathers eT once; stage 2
    reduces at every micro-step and gathers once; stage 3 reduces eT and gathers eT and the frozen weights, as they
    are stored, at every micro-step (within `stage3_max_live_parameters`; twice past it).

    Args:
        frozen_bytes: of the frozen parameters that ZeRO-3 shards; replicated ones are none.
        small_bytes: of the parameters, of both kinds, that ZeRO-3 keeps whole: gathered once, after the update.
    """
    t = trainable * element_size
    reduced = t * (accumulation if stage >= 2 else 1)
    gathered = {0: 0, 1: t, 2: t, 3: (t + frozen_bytes - small_bytes) * accumulation + small_bytes}[stage]
    both_ways, one_way = _both_ways(world_size), _one_way(world_size)
    # Stage 3 reduces by reduce_scatter, the others by all_reduce.
    return reduced + gathered, reduced * (one_way if stage == 3 else both_ways) + gathered * one_way


def _num_bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(item) for item in value)

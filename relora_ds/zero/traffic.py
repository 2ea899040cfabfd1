"""Exact bytes per collective, counted where they are sent: at torch.distributed's `c10d` operators.

DeepSpeed's own communication logger logs an all_gather at the size of a shard; counting below it gives
what really crosses the network. Two figures for each collective:

    payload   the size of the tensor that is reduced, gathered or scattered (whole, not per rank)
    wire      what one rank sends in a ring: 2(n-1)/n of the payload for an all_reduce, (n-1)/n for a gather,
              a scatter, a broadcast or a reduce

Counting intercepts every operator and costs time: switch it on for sampled steps.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def time_collectives() -> Iterator[Callable[[], dict[str, float]]]:
    """`with time_collectives() as spent:` has DeepSpeed wait for each of its collectives and add up their seconds.

    `spent()` says how many so far, by collective. torch.distributed's own calls are not among them.
    """
    import deepspeed  # here, because planning counts bytes without it

    comm = deepspeed.comm.comm
    timers = comm.timers.get_timers()  # the log's own latencies (0.19) are sums over all calls before
    for timer in timers.values():
        timer.reset()
    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
    try:
        yield lambda: {name: timer.elapsed(reset=False) / 1000 for name, timer in timers.items()}
    finally:
        comm.comms_logger.enabled = False


def expected_step(
    stage: int,
    *,
    trainable: int,
    frozen_bytes: int,
    element_size: int,
    accumulation: int,
    world_size: int,
    small_bytes: int = 0,
) -> tuple[float, float]:
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


def expected_collectives(
    stage: int,
    groups: list[list[int]],
    frozen: Sequence[tuple[int, int]] = (),
    *,
    element_size: int,
    accumulation: int,
    world_size: int,
    kept_whole: int = 0,
) -> dict[str, int]:
    """Payload bytes by collective of one optimizer step, DeepSpeed's padding included: `expected_step` to the byte.

    Stages 1 and 2 pad the flattened group to two elements a rank in every precision; ZeRO-3 each parameter to as many
    elements as ranks.

    Args:
        groups: the optimizer's groups, each with the sizes of its parameters in elements.
        frozen: `(elements, bytes of one)` of the frozen parameters that ZeRO-3 shards.
        kept_whole: parameters of at most so many elements are kept whole by ZeRO-3, and gathered after the update only
            (`stage3_param_persistence_threshold`).
    """
    trainable = [size for group in groups for size in group]
    total = sum(trainable) * element_size
    if stage == 0:
        return {"all_reduce": total}
    if stage < 3:
        return {
            "all_reduce": total * (accumulation if stage == 2 else 1),
            "all_gather": sum(_pad(sum(group), 2 * world_size) for group in groups) * element_size,
        }
    parameters = [(size, element_size) for size in trainable] + list(frozen)
    return {
        "all_gather": sum(
            _pad(size, world_size) * num_bytes * (1 if size <= kept_whole else accumulation)
            for size, num_bytes in parameters
        ),
        "reduce_scatter": sum(_pad(size, world_size) for size in trainable) * element_size * accumulation,
    }


def wire_bytes(collective: str, payload: float, world_size: int) -> float:
    """Return what one rank sends in a ring."""
    factors = {name: factor for name, _, factor in _COLLECTIVES.values()}
    return payload * factors[collective](world_size)


def _pad(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _num_bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(item) for item in value)

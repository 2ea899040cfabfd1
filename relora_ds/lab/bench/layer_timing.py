"""Layers that take turns, so that what else a machine does falls on all of them (`bench layer`)."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def times_in_turns(
    layers: dict[str, nn.Module], hidden: int, rows: int, dtype: torch.dtype, device: torch.device, repetitions: int
) -> dict[str, list[float]]:
    """Milliseconds of a forward and backward, for every layer as many as there are repetitions."""
    x = torch.randn(rows, hidden, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(rows, hidden, device=device).to(dtype)
    timed = _timed_on_cuda if device.type == "cuda" else _timed_on_cpu
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repetition in range(1 + repetitions):  # the first warms up
        for name, layer in layers.items():
            leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
            elapsed = timed(partial(_forward_and_backward, layer, x, leaves, upstream))
            if repetition:
                times[name].append(elapsed)
    return times


def _forward_and_backward(layer: nn.Module, x: Tensor, leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x), leaves, upstream)


def _timed_on_cpu(call: Callable[[], object]) -> float:
    """By a single thread's own clock, which stands still while other programs have its core; of several by the wall's.

    The CPU's part of a backward runs in the thread that calls it.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return 1e3 * (clock() - start)


def _timed_on_cuda(call: Callable[[], object], num_calls: int = 10) -> float:
    """Events on the stream, around several calls: one may be shorter than its launch."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num_calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / num_calls


def speeds(times: dict[str, list[float]], other: str) -> dict[str, float]:
    """Return for every layer the median of `other`'s time / its own, measured one after the other."""
    return {
        name: statistics.median(theirs / own for theirs, own in zip(times[other], values, strict=True))
        for name, values in times.items()
    }

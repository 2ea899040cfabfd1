"""How long steps take on a device that is not waited for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from relora_ds.training.totals import RunTotals


class StepClock:
    """Times training steps, and waits for the device only where somebody wants to know.

    A step returns while its last kernels run, and the next one is there before they end. So one step's seconds say
    little; those of all steps between two calls of `drain` are right.

    Attributes:
        newest: seconds of the newest step; what `drain` waited for is its own.
    """

    def __init__(self, device: torch.device, totals: RunTotals):
        self._device, self._totals = device, totals
        self._seconds, self._steps = 0.0, 0  # of the steps whose mean has not been asked for
        self._mean: float | None = None
        self._is_counting = False
        self.newest = 0.0

    @contextmanager
    def step(self, sampled: bool) -> Iterator[None]:
        """Time a step.

        sampled: its collectives are counted, which takes time. It is timed apart and is in no mean.
        """
        if sampled:
            self.drain()
        started = time.perf_counter()
        yield
        self.newest, self._is_counting = 0.0, not sampled
        self._steps += self._is_counting
        self._add(started)
        if sampled:
            self.drain()

    def drain(self) -> None:
        """Wait until the device has done all that it was given."""
        if self._device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize(self._device)
            self._add(started)

    def mean_seconds(self) -> float:
        """Return the mean of the steps since the last call; the former one where all of them were sampled."""
        self.drain()
        if self._steps:
            self._mean, self._seconds, self._steps = self._seconds / self._steps, 0.0, 0
        return self.newest if self._mean is None else self._mean

    def _add(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self.newest += seconds
        self._totals.seconds += seconds
        if self._is_counting:
            self._seconds += seconds

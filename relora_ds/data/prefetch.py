"""The next step's batch, made while the device computes this step's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from relora_ds.data.loader import TrainLoader


class Prefetched:
    """The batches of a `TrainLoader`, each made one step ahead by a thread.

    The state is that of the steps that were handed out: a batch that lies ready does not count.

    loader     gives the batches; nobody else asks it from here on
    ahead      False makes a batch when it is asked for: on a CPU a thread would take the cores that compute
    pin        in page-locked memory, which a CUDA device copies without anyone's waiting (`non_blocking=True`)
    """

    def __init__(self, loader: TrainLoader, *, ahead: bool, pin: bool) -> None:
        self._loader, self._ahead, self._pin = loader, ahead, pin
        self._state = loader.state_dict()
        self._next: _Making | None = None

    def next_step(self, is_last: bool = False) -> list[dict[str, torch.Tensor]]:
        """Micro-batches as of `TrainLoader.next_step`. is_last: none may follow, so that none is made ahead.

        Raises whatever kept the thread from making them.
        """
        micro_batches, self._state = self._make() if self._next is None else self._next.result()
        self._next = _Making(self._make) if self._ahead and not is_last else None
        return micro_batches

    def skip(self, steps: int) -> None:
        """Leave the batches of so many steps out."""
        if self._next is not None:
            self._next.result()
            self._next = None
            self._loader.load_state_dict(self._state)
        self._loader.skip(steps)
        self._state = self._loader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return `TrainLoader`'s state after the newest step that was handed out."""
        return self._state

    def _make(self) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
        micro_batches = list(self._loader.next_step())
        if self._pin:
            micro_batches = [{name: value.pin_memory() for name, value in batch.items()} for batch in micro_batches]
        return micro_batches, self._loader.state_dict()


class _Making(threading.Thread):
    """Calls `make` once. It ends with that: a run that stops, goes back or dies has no thread to close."""

    def __init__(self, make: Callable) -> None:
        super().__init__(name="next batch", daemon=True)
        self._function = make
        self._made = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._made = self._function()
        except BaseException as error:  # for the thread that waits
            self._error = error

    def result(self):
        """Return what was made; raise what was raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._made

"""Notices a run that makes no progress, says which rank it waits for, and ends it.

A rank that hangs leaves the others waiting in a collective until a timeout, of which NCCL's ends the process without a
word. So each rank has a thread that tells the others, over the store that they met at, how far its rank has come.
Where a rank has not moved for `guard.watchdog_seconds`, its thread looks who is silent or behind, and ends the
process: a main thread in a collective cannot be woken. Timeouts are set to longer than that. Where the store itself is
gone, because the process that kept it has died, the process ends within a minute.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from relora_ds.training import exit_codes
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.owned_directory import OwnedDirectory
from relora_ds.training.state import RunState
from relora_ds.zero.start import set_timeouts

_LAST_WORDS_S = 10  # for what is said at the end: the disk or the terminal may be what hangs
_GRACE_S = 30  # from the death of the store to the end: collectives that fail on their own say more


class Watchdog:
    """Watches this rank. Collective: every rank has one.

    Args:
        seconds: without progress before the run is called stuck.
        where: what the run is doing, for the message.
        on_stuck: called with the message and the exit code before the process ends.
    """

    def __init__(self, seconds: float, where: Callable[[], str], on_stuck: Callable[[str, int], None]):
        self._seconds, self._where, self._on_stuck = seconds, where, on_stuck
        self._timeout = timedelta(days=1, seconds=seconds)  # what is slow is no failure while the watchdog says nothing
        set_timeouts(self._timeout)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._every = min(5.0, seconds / 4)
        self._progress, self._closed = 0, threading.Event()
        agreed = [
            f"relora_ds/watchdog/{uuid.uuid4()}",  # torchrun's store may have what earlier attempts said
            socket.gethostname(),
        ]
        dist.broadcast_object_list(agreed, 0)
        self._prefix, self._first_host = agreed
        # Connected now: to connect to a store that has died takes as long as all of its time-outs.
        self._said, self._asked = self._store(), self._store()
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watcher.start()
        # A thread of its own: it hangs where the store does.
        threading.Thread(target=self._talk, name="watchdog's talk", daemon=True).start()

    def watch(self, module: nn.Module) -> None:
        """Count the forwards of an engine's module as progress. Call it when the engine exists, with its groups."""
        module.register_forward_pre_hook(self.beat)
        set_timeouts(self._timeout)

    def beat(self, *_) -> None:
        """Note that the rank has come further."""
        self._progress += 1

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._watcher.join()

    def blame(self) -> str:
        """Return a phrase naming the silent or slowest ranks. Takes some seconds: ranks are asked twice."""
        try:
            first = self._read()
            time.sleep(3 * self._every)
            second = self._read()
        except Exception:  # the store's own errors, of several kinds
            return f"{self._keeper()} does not answer"
        if silent := [rank for rank in second if first[rank]["beats"] == second[rank]["beats"]]:
            return f"{_names(silent, second)} does not answer"
        least = min(said["progress"] for said in second.values())
        behind = [rank for rank, said in second.items() if said["progress"] == least]
        if len(behind) == self._world_size:
            return "every rank answers and has begun the same forward"
        return f"{_names(behind, second)} is behind the others"

    def _keeper(self) -> str:
        """Name the process that keeps the store."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"torchrun on {os.environ.get('MASTER_ADDR')}, which keeps the store that the ranks met at,"
        return f"rank 0 on {self._first_host}, which keeps the store that the ranks met at,"

    def _store(self) -> dist.Store:
        """Connect to the store: a connection serves one thread at a time."""
        default: Any = _get_default_store()
        store = dist.PrefixStore(self._prefix, default.clone())
        store.set_timeout(timedelta(seconds=_LAST_WORDS_S))
        return store

    def _talk(self) -> None:
        """Say how far this rank is; where nobody can hear it any more, see to it that the process ends."""
        beats = 0
        try:
            while True:
                beats += 1
                self._said.set(
                    str(self._rank),
                    json.dumps({"beats": beats, "progress": self._progress, "host": socket.gethostname()}),
                )
                if self._closed.wait(self._every):
                    return
        except RuntimeError:
            if self._is_gone() and not self._closed.wait(_GRACE_S):
                self._end(f"{self._keeper()} has died, at {self._where()}", exit_codes.ERROR)

    def _is_gone(self) -> bool:
        """Return True if the store's process has died. A lost connection alone is no reason to end a run."""
        store: Any = _get_default_store()  # of a kind that has an address
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        try:
            socket.create_connection((store.host, store.port), _LAST_WORDS_S).close()
        except ConnectionRefusedError:
            return True
        except (OSError, AttributeError):  # a host that does not answer; a store without an address
            return False
        return False

    def _read(self) -> dict[int, dict]:
        return {rank: json.loads(self._asked.get(str(rank))) for rank in range(self._world_size)}

    def _watch(self) -> None:
        seen, since = -1, time.monotonic()
        while not self._closed.wait(self._every):
            if self._progress != seen:
                seen, since = self._progress, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                blame = self.blame()
                if self._progress == seen:
                    self._end(
                        f"guard.watchdog_seconds: no progress for {self._seconds:g} s at {self._where()}; {blame}",
                        exit_codes.GUARD,
                    )

    def _end(self, message: str, code: int) -> None:
        def say() -> None:
            self._on_stuck(message, code)
            print(f"error: rank {self._rank}: {message}", file=sys.stderr, flush=True)

        last_words = threading.Thread(target=say, daemon=True)
        last_words.start()
        last_words.join(_LAST_WORDS_S)
        os._exit(code)


class Watching(Hook):
    """Has a watchdog while the run lasts."""

    def __init__(self, directory: OwnedDirectory):
        self._directory = directory
        self._watchdog: Watchdog | None = None

    def on_start(self, run: RunState) -> None:
        self._watchdog = Watchdog(
            run.recipe.guard.watchdog_seconds,
            lambda: f"step {run.step}",
            lambda message, code: self._directory.set_status(run.step, "failed", message, code),
        )

    def on_phase(self, run: RunState) -> None:
        self.beat()

    def on_phase_end(self, run: RunState) -> None:
        self.beat()

    def beat(self) -> None:
        """Tell that the rank has come further."""
        if self._watchdog is not None:
            self._watchdog.beat()

    def watch(self, module: nn.Module) -> None:
        """Watch a new engine's forwards, and set the timeouts of its process groups."""
        if self._watchdog is not None:
            self._watchdog.watch(module)

    def explained(self, error: RuntimeError) -> RuntimeError:
        """Return the error, or one that adds whom the ranks wait for: a rank that died says nothing itself.

        (NCCL's own thread ends the process, and nothing is raised.)
        """
        if self._watchdog is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return RuntimeError(f"{error}; {self._watchdog.blame()}")
        return error

    def close(self, run: RunState) -> None:
        if self._watchdog is not None:
            self._watchdog.close()


def _names(ranks: list[int], said: dict[int, dict]) -> str:
    return ", ".join(f"rank {rank} on {said[rank]['host']}" for rank in ranks)

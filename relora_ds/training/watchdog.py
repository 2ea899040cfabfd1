"""Notices a run that stands still, says which rank it waits for, and ends it.

A rank that hangs leaves the others waiting in a collective, for ever or for the half hour of torch's timeout. So each
rank has a thread that tells the others, over the store that they met at, how far its rank has come. Where a rank has
not moved for `guard.watchdog_seconds`, its thread looks who is silent or behind, and ends the process: a main thread
in a collective cannot be woken.
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

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

EXIT_GUARD = 3
_LAST_WORDS_S = 10  # for what is said at the end: the disk or the terminal may be what stands still


class Watchdog:
    """Watches this rank. Collective: every rank has one.

    Args:
        seconds: without progress before the run is called stuck.
        where: what the run is doing, for the message.
        on_stuck: called with the message before the process ends.
    """

    def __init__(self, seconds: float, where: Callable[[], str], on_stuck: Callable[[str], None]):
        self._seconds, self._where, self._on_stuck = seconds, where, on_stuck
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._every = min(5.0, seconds / 4)
        self._progress, self._closed = 0, threading.Event()
        prefix = [f"relora_ds/watchdog/{uuid.uuid4()}"]  # torchrun's store may have what earlier attempts said
        dist.broadcast_object_list(prefix, 0)
        self._prefix = prefix[0]
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watcher.start()
        # A thread of its own: it stands still where the store does.
        threading.Thread(target=self._talk, name="watchdog's talk", daemon=True).start()

    def beat(self, *_) -> None:
        """The rank has come further."""
        self._progress += 1

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._watcher.join()

    def blame(self) -> str:
        """Who does not answer, or else is behind: a part of a sentence. Takes some seconds: ranks are asked twice."""
        try:
            store = self._store()
            first = self._read(store)
            time.sleep(3 * self._every)
            second = self._read(store)
        except Exception:  # the store's own errors, of several kinds
            return "the store that the ranks met at (rank 0 or torchrun keeps it) does not answer"
        if silent := [rank for rank in second if first[rank]["beats"] == second[rank]["beats"]]:
            return f"{_names(silent, second)} does not answer"
        least = min(said["progress"] for said in second.values())
        behind = [rank for rank, said in second.items() if said["progress"] == least]
        if len(behind) == self._world_size:
            return "every rank answers and has begun the same forward"
        return f"{_names(behind, second)} is behind the others"

    def _store(self) -> dist.Store:
        store = dist.PrefixStore(self._prefix, _get_default_store().clone())  # of this thread's own
        store.set_timeout(timedelta(seconds=_LAST_WORDS_S))
        return store

    def _talk(self) -> None:
        """Say how far this rank is."""
        beats = 0
        try:
            store = self._store()
            while True:
                beats += 1
                store.set(str(self._rank), json.dumps(
                    {"beats": beats, "progress": self._progress, "host": socket.gethostname()}))
                if self._closed.wait(self._every):
                    return
        except RuntimeError:  # its host is gone
            return

    def _read(self, store: dist.Store) -> dict[int, dict]:
        return {rank: json.loads(store.get(str(rank))) for rank in range(self._world_size)}

    def _watch(self) -> None:
        seen, since = -1, time.monotonic()
        while not self._closed.wait(self._every):
            if self._progress != seen:
                seen, since = self._progress, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                blame = self.blame()
                if self._progress == seen:
                    self._end(blame)

    def _end(self, blame: str) -> None:
        message = f"guard.watchdog_seconds: no progress for {self._seconds:g} s at {self._where()}; {blame}"

        def say() -> None:
            self._on_stuck(message)
            print(f"error: rank {self._rank}: {message}", file=sys.stderr, flush=True)

        last_words = threading.Thread(target=say, daemon=True)
        last_words.start()
        last_words.join(_LAST_WORDS_S)
        os._exit(EXIT_GUARD)


def _names(ranks: list[int], said: dict[int, dict]) -> str:
    return ", ".join(f"rank {rank} on {said[rank]['host']}" for rank in ranks)

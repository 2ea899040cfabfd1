"""Which rank uploads for which ranks, and what these ranks tell each other, over the store that they met at.

Uploads take part in no collective: they may take hours, and a rank that waits for nothing else would wait for them.
"""

import json
import socket
import threading
import uuid
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from relora_ds.checkpoint.sharing import Sharing, rank_of


class Hosts:
    """The ranks by host and disk. Collective: every rank makes one.

    Attributes:
        rank: this one.
        leads: whether it is the first of its host.
        others: the first ranks of the other hosts.
    """

    def __init__(self, sharing: Sharing):
        here = (socket.gethostname(), sharing.peers[0])
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, here)
        self._first = [everywhere.index(each) for each in everywhere]  # by rank
        self.rank = dist.get_rank()
        self.leads = self._first[self.rank] == self.rank
        self.others = sorted({*self._first} - {0})
        prefix = [f"relora_ds/uploads/{uuid.uuid4()}"]
        dist.broadcast_object_list(prefix, 0)
        default: Any = _get_default_store()
        self._store = dist.PrefixStore(prefix[0], default.clone())  # a connection serves one thread at a time
        self._lock = threading.Lock()

    def is_mine(self, name: str) -> bool:
        """Return True if this rank uploads a file of a checkpoint."""
        rank = rank_of(name)
        # Of more ranks than there are now, on a disk that all share.
        first = 0 if rank is None or rank >= len(self._first) else self._first[rank]
        return self.leads and first == self.rank

    def say(self, key: str, value: Any) -> None:
        """Say something to all other ranks."""
        with self._lock:
            self._store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """Return what was said; None where nothing was."""
        with self._lock:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

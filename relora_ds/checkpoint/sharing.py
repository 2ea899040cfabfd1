"""Which ranks see the same directory: on a disk that hosts share all of them do, else those of one host."""

import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

_RANK = re.compile(r"(?:trained|frozen)_(\d{5})\.safetensors")


@dataclass(frozen=True)
class Sharing:
    """Return this rank and a directory.

    Attributes:
        leads: whether this rank is the first that sees its directory.
        peers: the ranks that see the same one, this one among them.
        is_shared: whether all ranks do.
    """

    leads: bool
    peers: list[int]
    is_shared: bool

    def is_here(self, name: str) -> bool:
        """Return True if a file of a checkpoint belongs on this rank's disk; its name says which rank wrote it."""
        rank = rank_of(name)
        return self.is_shared or rank is None or rank in self.peers


def rank_of(name: str) -> int | None:
    """Return the rank that wrote a file of a checkpoint, from its name; None where any may have."""
    found = _RANK.fullmatch(name)
    return None if found is None else int(found[1])


def find_peers(directory: Path) -> Sharing:
    """Find out who sees the same directory, which is made where it is missing. Collective."""
    directory.mkdir(parents=True, exist_ok=True)
    prefix = [f".{uuid.uuid4()}_rank_"]  # another start may have left its marks
    dist.broadcast_object_list(prefix, 0)
    marks = [directory / f"{prefix[0]}{rank}" for rank in range(dist.get_world_size())]
    mark = marks[dist.get_rank()]
    mark.touch()
    dist.barrier()
    # Each is asked for by its name: a network disk may answer with an old list of a directory's entries.
    peers = [rank for rank, path in enumerate(marks) if path.exists()]
    dist.barrier()
    mark.unlink(missing_ok=True)  # the writer clears up what other starts left, and may come first
    return Sharing(peers[0] == dist.get_rank(), peers, len(peers) == len(marks))

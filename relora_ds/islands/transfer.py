"""Cut blobs into the bytes of messages, and put them together again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from relora_ds.islands.framing import CHUNK

MAX_PIECES = 4096  # of one message, so that its header stays small


class Stream:
    """Blobs as one sequence of bytes.

    Attributes:
        index: their sizes in bytes, in their order.
        size: of all.
    """

    def __init__(self, blobs: Mapping[str, bytes | memoryview]):
        self._blobs = [memoryview(blob).cast("B") for blob in blobs.values()]
        self.index = {name: len(blob) for name, blob in zip(blobs, self._blobs, strict=True)}
        self._starts = list(accumulate(self.index.values(), initial=0))
        self.size = self._starts.pop()

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer at the end."""
        found: list[memoryview] = []
        number = bisect_right(self._starts, offset) - 1
        while size > 0 and number < len(self._blobs):
            piece = self._blobs[number][offset - self._starts[number] :][:size]
            found.append(piece)
            offset, size, number = offset + len(piece), size - len(piece), number + 1
        return b"".join(found)


@dataclass
class Batch:
    """What one message asks for.

    Attributes:
        ranges: (rank, offset, size) of bytes that a rank of an island has sent.
        targets: where each of them belongs.
        size: of all, in bytes.
    """

    ranges: list[tuple[int, int, int]] = field(default_factory=list)
    targets: list[memoryview] = field(default_factory=list)
    size: int = 0

    def fill(self, payload: bytes) -> None:
        """Copy the bytes of the reply to where they belong."""
        offset = 0
        for target in self.targets:
            target[:] = payload[offset : offset + len(target)]
            offset += len(target)


def batches(places: Iterable[tuple[Sequence[int], memoryview]]) -> Iterator[Batch]:
    """Divide blobs among messages; each is given by its (rank, offset, size) and the memory for it."""
    batch = Batch()
    for (rank, offset, size), target in places:
        begin = 0
        while begin < size:
            if batch.size == CHUNK or len(batch.ranges) == MAX_PIECES:
                yield batch
                batch = Batch()
            piece = min(size - begin, CHUNK - batch.size)
            batch.ranges.append((rank, offset + begin, piece))
            batch.targets.append(target[begin : begin + piece])
            batch.size += piece
            begin += piece
    if batch.ranges:
        yield batch

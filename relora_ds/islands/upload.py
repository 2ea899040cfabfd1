"""One rank's part of a contribution while it arrives: a file that grows, and has its name only when it is whole."""

from __future__ import annotations

import os
from pathlib import Path

from relora_ds.islands.refusals import LinkRefused
from relora_ds.islands.remembered import Part
from relora_ds.utils import files


class Upload:
    """A part that arrives.

    Attributes:
        part: what its rank says of it.
        have: how many of its bytes are here.
    """

    def __init__(self, stem: Path, part: Part):
        self.part, self.have = part, 0
        self._stem, self._size = stem, sum(part.index.values())
        stem.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(stem.with_suffix(".part"), "wb")  # noqa: SIM115

    @property
    def is_whole(self) -> bool:
        """Whether every byte is here."""
        return self.have == self._size

    def write(self, offset: int, payload: bytes) -> bool:
        """Append bytes that begin at `offset`; returns False if others before them are missing.

        Raises:
            LinkRefused: the index has no such bytes. OSError: they cannot be written.
        """
        if offset + len(payload) > self._size:
            raise LinkRefused(f"part: it ends at byte {offset + len(payload)}, the index at {self._size}")
        if offset > self.have:
            return False
        if offset == self.have:  # else they came before a connection broke, and are here
            self._file.write(payload)
            self.have += len(payload)
        return True

    def finish(self) -> None:
        """Give the part its name; it is on the disk then. Its index comes last and says that it is whole.

        Raises:
            OSError: it cannot be written.
        """
        files.sync(self._file)
        self.close()
        os.replace(self._stem.with_suffix(".part"), self._stem.with_suffix(".blobs"))
        files.write_json(self._stem.with_suffix(".json"), self.part.as_json())
        for folder in (
            self._stem.parents[1],
            self._stem.parents[2],
            self._stem.parents[3],
        ):  # incarnation, island, round
            files.sync(folder)

    def close(self) -> None:
        """Give up what has arrived."""
        self._file.close()

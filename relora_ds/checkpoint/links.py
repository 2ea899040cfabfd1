"""Share the files of frozen weights among checkpoints: hard links to those of an earlier checkpoint of the cycle."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from relora_ds.checkpoint.manifest import FROZEN, File


@dataclass(frozen=True)
class FrozenFiles:
    """The files of frozen weights that later checkpoints of the same cycle share.

    Attributes:
        cycle: of the engine, when they were written.
        directory: the checkpoint that has them.
        files: as in its manifest.
        marks: of those that this rank links: what tells that a file is still the one that was verified.
    """

    cycle: int
    directory: Path
    files: dict[str, File]
    marks: dict[str, tuple[int, ...]]

    def link(self, directory: Path) -> list[str]:
        """Link into a new directory what is marked; return the names.

        Raises:
            OSError: one was moved, deleted or changed, or is on another file system.
        """
        directory.mkdir()
        for name, known in self.marks.items():
            os.link(self.directory / name, directory / name)
            if mark(directory / name) != known:
                raise OSError(f"{self.directory / name} was changed")
        return list(self.marks)


def remember(directory: Path, listed: dict[str, File], cycle: int, leads: bool) -> FrozenFiles:
    """Note the frozen files of a checkpoint for the next one. leads: this rank links them."""
    listed = {name: file for name, file in listed.items() if name.startswith(FROZEN)}
    marks = {}
    for name, file in listed.items() if leads else ():
        with contextlib.suppress(OSError):  # it is on another host's disk, or gone: that is looked into later
            found = mark(directory / name)
            if found[0] == file.size:
                marks[name] = found
    return FrozenFiles(cycle, directory, listed, marks)


def mark(path: Path) -> tuple[int, ...]:
    """Return size, time of change and inode of a file; it is opened: a network disk may answer stat() from memory."""
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns, about.st_ino

"""One checkpoint on its way to the disk, and how that went."""

import time
from dataclasses import dataclass
from pathlib import Path

from relora_ds.checkpoint.contents import Captured


@dataclass(frozen=True)
class Written:
    """How a checkpoint went.

    Attributes:
        step: the training step that it captures.
        bytes: of all its files; new_bytes: without those that an earlier checkpoint has too.
        stall_s, write_s: seconds that training waited, and that writing took in total.
        error: why there is none; None where there is.
    """

    step: int
    bytes: int
    new_bytes: int
    stall_s: float
    write_s: float
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """One checkpoint, from the copy of the state to the rename.

    Attributes:
        target: its directory.
        captured: what this rank writes; None where that failed, see `error`.
        cycle: of the engine when it was captured.
        started, stall_s: when `save` was called, and for how many seconds training waited.
    """

    target: Path
    step: int
    run: dict
    is_latest: bool
    captured: Captured | None
    error: str | None
    cycle: int
    started: float
    stall_s: float

    @property
    def temporary(self) -> Path:
        """Where its files are written; no name that somebody else would give."""
        return self.target.with_name(f".{self.target.name}.writing")

    def done(self, size: int, new: int, error: str | None) -> Written:
        return Written(self.step, size, new, self.stall_s, time.perf_counter() - self.started, error)

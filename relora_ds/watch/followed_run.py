"""A run that is followed: what its small files say, read again and again while it trains.

metrics.jsonl is read from where the last look ended. A resume drops lines that the checkpoint does not have and
replaces the file; then all of it is read again.
"""

import logging
import os
import socket
from collections import defaultdict
from pathlib import Path

from relora_ds.checkpoint.run_files import METRICS, line_in, read_json
from relora_ds.config import Recipe, read_recipe

logger = logging.getLogger(__name__)

_NUMBERS = (
    *("step", "time", "loss", "val_loss", "tokens_per_s", "total_bytes_wire", "full_rank_bytes_wire"),
    *("restart_s", "bytes", "write_s", "sync_s"),
)
_OTHERS = {"state": str, "reason": str, "islands": list, "missing": list}


class FollowedRun:
    """What is known of a run so far.

    Args:
        directory: of the run.

    Attributes:
        name: what it is called beside others.
        recipe: None before the run has written it, and while it does not say how long the run is.
        status: of status.json; {} before there is one.
        lines: those of metrics.jsonl, by kind, in the order of their steps.

    Raises:
        ValueError: there is no such directory.
    """

    def __init__(self, directory: Path, name: str):
        if not directory.is_dir():
            raise ValueError(f"RUN: {directory} is no directory; give run directories, e.g. runs/llama_60m_relora")
        self.directory, self.name = directory, name
        self.recipe: Recipe | None = None
        self.status: dict = {}
        self.lines: dict[str, list[dict]] = defaultdict(list)
        self._offset, self._inode = 0, -1
        self._recipe_state: tuple[int, int] | None = None  # of the file that was read

    def look(self) -> None:
        """Read what is new. A file that cannot be read now is read the next time."""
        self.status = _readable(read_json(self.directory / "status.json"))
        try:
            self._read_recipe()
            self._read_metrics()
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            logger.warning("%s cannot be read: %s", self.directory / METRICS, error.strerror or error)

    @property
    def lost_process(self) -> str:
        """The process that has the directory, where it ran on this machine and is gone; "" otherwise."""
        try:
            words = (self.directory / "lock").read_text(encoding="utf-8").split()
            pid, host = int(words[1]), words[3]
        except (OSError, ValueError, IndexError):
            return ""
        if host != socket.gethostname() or _is_alive(pid):
            return ""
        return f"process {pid}"

    def _read_recipe(self) -> None:
        path = self.directory / "recipe.yaml"
        if not path.is_file():
            return
        about = path.stat()
        if (state := (about.st_ino, about.st_mtime_ns)) == self._recipe_state:
            return
        recipe, _ = read_recipe(path, check_files=False)  # of another version it has problems, and may do all the same
        has_length = recipe.train.steps is not None or recipe.train.tokens is not None  # a damaged one has not
        self.recipe, self._recipe_state = recipe if has_length else None, state

    def _read_metrics(self) -> None:
        with (self.directory / METRICS).open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._inode or about.st_size < self._offset:
                self._forget()
                self._inode = about.st_ino
            file.seek(self._offset)
            new = file.read()
        whole = new.rfind(b"\n") + 1  # the last line may still be being written
        self._offset += whole
        for line in map(line_in, new[:whole].splitlines()):
            if line is not None:  # of damaged ones `relora plot` tells
                self.lines[line["kind"]].append(_readable(line))

    def _forget(self) -> None:
        self.lines.clear()
        self._offset, self._inode = 0, -1


def _readable(values: dict) -> dict:
    """Return the values that can be shown: a damaged file may have anything under a name."""
    return {
        key: value
        for key, value in values.items()
        if (_is_number(value) if key in _NUMBERS else isinstance(value, _OTHERS.get(key, object)))
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and -1e300 < value < 1e300  # no NaN, no infinity


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True

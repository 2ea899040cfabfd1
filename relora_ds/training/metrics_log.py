"""metrics.jsonl, written by rank 0, and what its numbers are called in charts."""

import errno
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from relora_ds.checkpoint.run_files import METRICS, metrics_in
from relora_ds.checkpoint.run_files import read_json as read_json  # figures read a run through this room
from relora_ds.checkpoint.run_files import read_metrics as read_metrics
from relora_ds.training.hooks.loggers.logger import Logger
from relora_ds.utils.files import write_text

logger = logging.getLogger(__name__)

_MOST_UNWRITTEN = 10_000  # lines kept in memory while the disk is full; the oldest are lost first

# What a number of metrics.jsonl is called in TensorBoard, whose charts are grouped by what stands before the "/".
# A mapping (`update_norms`) becomes one chart per entry; None: it never changes and needs no chart.
TENSORBOARD_TAGS: dict[str, dict[str, str | None]] = {
    "train": {
        "loss": "loss/train",
        "lr": "optim/lr",
        "grad_norm": "optim/grad_norm",
        "tokens": "progress/tokens",
        "restarts": "progress/restarts",
        "tokens_per_s": "speed/tokens_per_s",
        "step_s": "speed/step_s",
        "mfu": "speed/mfu",
        "bytes_payload": "traffic/step_bytes_payload",
        "bytes_wire": "traffic/step_bytes_wire",
        "total_bytes_wire": "traffic/total_bytes_wire",
        "full_rank_bytes_wire": "traffic/total_bytes_wire_of_full_rank",
        "peak_memory_bytes": "memory/peak_bytes",
        "max_update_over_lr": "restart/max_update_over_lr",
        "residual_updates": "progress/residual_updates",
        "residual_s": "speed/residual_s",
    },
    "eval": {
        "val_loss": "loss/validation",
        "ppl": "perplexity/per_token",
        "word_ppl": "perplexity/per_word",
        "bits_per_byte": "perplexity/bits_per_byte",
        "galore_loss": "loss/validation_as_galore",
        "val_tokens": None,
    },
    "tasks": {"scores": "tasks"},
    "restart": {
        "restarts": None,
        "update_norms": "update_norm",
        "relative_update_norms": "update_norm_relative",
    },
    "phase": {"trainable_parameters": "parameters/trainable", "total_parameters": "parameters/total"},
}


class MetricsLog:
    """One JSON object a line in RUN/metrics.jsonl, and the same numbers to loggers.

    A disk that is full or gone costs warnings: lines are kept and written as soon as it is possible again.

    Args:
        resume_step: what an interrupted run wrote past this step is dropped, so that steps stay unique; None: nothing.
        may_write: whether the directory is this run's now.
        loggers: see `hooks.loggers`; they are this log's to close.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int | None = None,
        may_write: Callable[[], bool] = lambda: True,
        loggers: Sequence[Logger] = (),
    ):
        self._path, self._may_write, self._loggers = run_dir / METRICS, may_write, loggers
        self._unwritten: deque[str] = deque(maxlen=_MOST_UNWRITTEN)
        if resume_step is not None:
            _drop_after(self._path, resume_step)

    def write(self, kind: str, *, step: int, t: int, phase: str, **values: Any) -> None:
        """Append a line: `kind` is train, eval, tasks, restart, sync, phase, checkpoint, upload or spike.

        Non-finite numbers become null.
        """
        line = {"kind": kind, "step": step, "t": t, "phase": phase, "time": time.time(), **values}
        self._unwritten.append(json.dumps(_json_value(line)) + "\n")
        self._write_out()
        if self._may_write():
            scalars = scalars_of(kind, values)
            for each in self._loggers:
                each.scalars(scalars, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Give a text to the loggers."""
        if self._may_write():
            for each in self._loggers:
                each.text(tag, markdown, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._write_out()
        if self._may_write():
            for each in self._loggers:
                each.close()

    def _write_out(self) -> None:
        if not (self._unwritten and self._may_write()):
            return
        try:
            _append(self._path, "".join(self._unwritten).encode())
        except OSError as error:
            logger.warning(
                "%s lacks the newest lines: %s; they are written when it is possible again",
                METRICS,
                error.strerror or error,
            )
        else:
            self._unwritten.clear()


def scalars_of(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line by their tag in TensorBoard, which the other loggers use too."""
    tags, found = TENSORBOARD_TAGS.get(kind, {}), {}
    for name, value in values.items():
        tag = tags.get(name, f"{kind}/{name}")
        for key, number in (value if isinstance(value, dict) else {"": value}).items():
            if tag and isinstance(number, (int, float)) and not isinstance(number, bool):
                found[f"{tag}/{key}".rstrip("/")] = number
    return found


def _append(path: Path, data: bytes) -> None:
    """Append to a file: all of it or, with OSError, nothing."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _drop_after(path: Path, step: int) -> None:
    """Drop the lines past `step` and damaged ones; a file that cannot be read or replaced stays, with a warning."""
    try:
        kept = [line for line in metrics_in(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s still has its lines past step %d: %s", path, step, error.strerror or error)


def _json_value(value: Any) -> Any:
    """`value` with every non-finite number in it replaced by None, which JSON can say."""
    if isinstance(value, dict):
        return {key: _json_value(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

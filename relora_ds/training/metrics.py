"""metrics.jsonl and TensorBoard, written by rank 0."""

import json
import math
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """One JSON object a line in RUN/metrics.jsonl, and the same numbers in RUN/tensorboard/.

    Args:
        enabled: False on every rank but 0: all calls do nothing.
        resume_step: what an interrupted run wrote past this step is dropped, so that steps stay unique.
    """

    def __init__(self, run_dir: Path, *, enabled: bool, resume_step: int | None = None):
        self.enabled = enabled
        if not enabled:
            return
        path = run_dir / "metrics.jsonl"
        if resume_step is not None and path.is_file():
            _drop_after(path, resume_step)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(run_dir / "tensorboard",
                                    purge_step=None if resume_step is None else resume_step + 1)

    def write(self, kind: str, *, step: int, t: int, phase: str, **values) -> None:
        """Append a line: `kind` is train, eval, restart, phase or checkpoint. Non-finite numbers become null."""
        if not self.enabled:
            return
        line = {"kind": kind, "step": step, "t": t, "phase": phase, "time": time.time(), **values}
        self._file.write(json.dumps({k: _json_number(v) for k, v in line.items()}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            self._board.close()


def read_metrics(run_dir: Path) -> list[dict]:
    """All lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _drop_after(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)


def _json_number(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value

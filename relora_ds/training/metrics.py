"""metrics.jsonl and TensorBoard, written by rank 0."""

import json
import logging
import math
import time
from pathlib import Path

logger = logging.getLogger(__name__)

# What a number of metrics.jsonl is called in TensorBoard, whose charts are grouped by what stands before the "/".
# A mapping (`update_norms`) becomes one chart per entry; None: it never changes and needs no chart.
TENSORBOARD_TAGS = {
    "train": {"loss": "loss/train", "lr": "optim/lr", "grad_norm": "optim/grad_norm", "tokens": "progress/tokens",
              "restarts": "progress/restarts", "tokens_per_s": "speed/tokens_per_s", "step_s": "speed/step_s",
              "bytes_payload": "traffic/step_bytes_payload", "bytes_wire": "traffic/step_bytes_wire",
              "total_bytes_wire": "traffic/total_bytes_wire",
              "full_rank_bytes_wire": "traffic/total_bytes_wire_of_full_rank",
              "peak_memory_bytes": "memory/peak_bytes", "max_update_over_lr": "restart/max_update_over_lr"},
    "eval": {"val_loss": "loss/validation", "ppl": "perplexity/per_token", "word_ppl": "perplexity/per_word",
             "bits_per_byte": "perplexity/bits_per_byte", "galore_loss": "loss/validation_as_galore",
             "val_tokens": None},
    "restart": {"restarts": None, "update_norms": "update_norm", "relative_update_norms": "update_norm_relative",
                "update_ranks": "update_rank"},
    "phase": {"trainable_parameters": "parameters/trainable", "total_parameters": "parameters/total"},
}


class MetricsLog:
    """One JSON object a line in RUN/metrics.jsonl, and the same numbers in RUN/tensorboard/ (its x axis: `step`).

    Args:
        enabled: False on every rank but 0: all calls do nothing.
        resume_step: what an interrupted run wrote past this step is dropped, so that steps stay unique.
    """

    def __init__(self, run_dir: Path, *, enabled: bool, resume_step: int | None = None):
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # here, because reading metrics needs no torch
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
        try:
            self._file.write(json.dumps(_json_value(line)) + "\n")
            self._chart(kind, step, values)
        except OSError as error:  # a full disk is no reason to stop
            logger.warning("metrics.jsonl and TensorBoard lack lines: %s", error)

    def _chart(self, kind: str, step: int, values: dict) -> None:
        tags = TENSORBOARD_TAGS.get(kind, {})
        for name, value in values.items():
            tag = tags.get(name, f"{kind}/{name}")
            for key, number in (value if isinstance(value, dict) else {"": value}).items():
                if tag and isinstance(number, (int, float)) and not isinstance(number, bool):
                    self._board.add_scalar(f"{tag}/{key}".rstrip("/"), number, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text in TensorBoard only."""
        if self.enabled:
            self._board.add_text(tag, markdown, step)

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            self._board.close()


def read_metrics(run_dir: Path) -> list[dict]:
    """All lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    for text in (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
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


def _json_value(value):
    """`value` with every non-finite number in it replaced by None, which JSON can say."""
    if isinstance(value, dict):
        return {key: _json_value(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

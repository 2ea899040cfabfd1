"""Run directories as a run leaves them, written in milliseconds."""

import json
import math
from pathlib import Path

STEPS, RESTARTS = 200, (80, 120, 160)


def write_run(
    directory: Path,
    method: str = "relora",
    *,
    steps: int = STEPS,
    world_size: int = 2,
    final: float = 3.0,
    state: str = "done",
    reason: str = "",
) -> Path:
    """A run of `steps` steps whose loss falls from 9 to `final`: a warm start of 40 steps, restarts every 40."""
    directory.mkdir(parents=True)
    low_rank = method in ("lora", "relora")
    lines = [_line("phase", 0, trainable_parameters=1000, total_parameters=1000)]
    sent = full = 0.0
    for step in range(1, steps + 1):
        sent += (500 if low_rank and step > 40 else 1000) * (world_size > 1)
        full += 1000 * (world_size > 1)
        loss = final + (9 - final) * math.exp(-step / 8) + 0.1 * math.sin(37 * step)
        if step == 41 and low_rank:
            lines.append(_line("phase", 40, trainable_parameters=600, total_parameters=1200))
        if step in RESTARTS and method == "relora":
            lines.append(_line("restart", step, restarts=RESTARTS.index(step) + 1, update_norms={"layer": 1.0}))
        lines.append(
            _line(
                "train",
                step,
                loss=loss,
                lr=1e-3,
                tokens=64 * step,
                tokens_per_s=1000 + step,
                total_bytes_wire=sent,
                full_rank_bytes_wire=full,
            )
        )
        if step % 40 == 0:
            lines.append(
                _line(
                    "eval",
                    step,
                    val_loss=loss + 0.2,
                    bits_per_byte=loss / 2,
                    samples=[{"prompt": "a <b>", "text": " & c"}],
                )
            )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "recipe.yaml").write_text(f"method: {method}\nmodel:\n  preset: tiny\n")
    (directory / "status.json").write_text(json.dumps({"state": state, "step": steps, "reason": reason}))
    if state == "done":
        (directory / "summary.json").write_text(json.dumps({"verdict": f"{method} ended well."}))
    return directory


def _line(kind: str, step: int, **values) -> dict:
    return {"kind": kind, "step": step, "t": step, "phase": "relora" if step >= 40 else "warm_start", **values}

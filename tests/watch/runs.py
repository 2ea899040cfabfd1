"""Run directories as a trainer leaves them at some moment, without one."""

import json
import os
import socket
from pathlib import Path

BEGAN, STEP_S = 1_000_000.0, 2.0  # seconds since the epoch; of a step


def write_run(directory: Path, steps: int, *, state: str = "running", reason: str = "", total: int = 1000) -> Path:
    """Write a run that logs every 10 steps, evaluates and restarts every 100, and has come this far."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text(f"method: relora\nrun_dir: {directory}\ntrain: {{steps: {total}}}\n")
    status = {"state": state, "step": steps, "reason": reason, "exit_code": None, "time": BEGAN + STEP_S * steps}
    (directory / "status.json").write_text(json.dumps(status))
    (directory / "lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_until(steps)))
    return directory


def lines_until(steps: int) -> list[dict]:
    found = []
    for step in range(10, steps + 1, 10):
        at = {"step": step, "t": step, "phase": "relora", "time": BEGAN + STEP_S * step}
        train = {"loss": 3 + 100 / step, "tokens_per_s": 500.0, "total_bytes_wire": 1e6 * step}
        found.append({"kind": "train", **at, **train, "full_rank_bytes_wire": 3e6 * step})
        if step % 100 == 0:
            found.append({"kind": "eval", **at, "val_loss": 3 + 120 / step})
            found.append({"kind": "restart", **at, "restart_s": 0.5})
    return found

"""Through the real launchers, in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(
        command, cwd=ROOT, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=600
    )


def launchers(port: int) -> dict[str, list[str]]:
    return {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(port), "train.py"],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(port), "train.py"],
        "python": [sys.executable, "train.py"],
        "module": [sys.executable, "-m", "relora_ds", "train"],
    }


@pytest.mark.parametrize("name", ["deepspeed", "torchrun", "python", "module"])
def test_every_launcher(name, tmp_path):
    result = run(*launchers(29871)[name], "--config", "tiny", f"run_dir={tmp_path / 'run'}", "train.steps=22")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    assert result.stdout.count("restart 1: merged") == 1 and "verified on all ranks" in result.stdout

    exported = run(sys.executable, "-m", "relora_ds", "export", str(tmp_path / "run"), str(tmp_path / "model"))
    assert exported.returncode == 0 and (tmp_path / "model" / "config.json").is_file()
    again = run(sys.executable, "-m", "relora_ds", "export", str(tmp_path / "run"), str(tmp_path / "model"))
    assert again.returncode == 1 and "not empty" in again.stderr


def test_an_error_is_printed_once_by_two_ranks(tmp_path):
    result = run(*launchers(29872)["deepspeed"], "--config", "tiny", f"run_dir={tmp_path / 'run'}", "relora.r=65")
    printed = result.stdout + result.stderr
    assert printed.count("error: ") == 1 and "relora.r: 65 exceeds" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()

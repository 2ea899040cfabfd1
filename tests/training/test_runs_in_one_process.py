"""Several runs in one process, as in a notebook."""

import os
import subprocess
import sys
from pathlib import Path

from tests.devices import GUARD

ROOT = Path(__file__).parents[2]
PROGRAM = """
from relora_ds.train import main

short = ["warm_start_steps=4", "relora.restart_every=4", "train.steps=10", "eval.samples=0"]  # a restart after 8
for name in ("first", "second"):
    assert main(["--config", "tiny", f"run_dir={name}", *short]) == 0
"""


def test_a_second_run_in_the_same_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": f"{GUARD}:{ROOT}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "second" / "export" / "model.safetensors").is_file()

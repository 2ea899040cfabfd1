"""`torchrun --max-restarts`: a rank is killed, and the run goes on by itself."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.launch.scripts import ROOT, start
from tests.training.runs import losses, run, status

SETTINGS = ["checkpoint.every=4", "eval.samples=0", "precision=bf16"]


def process_of(rank: int, run_dir: Path) -> int:
    """The process of a rank of the run in `run_dir`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (path / "cmdline").read_bytes(), (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is somebody else's
            continue
        if str(run_dir).encode() in command and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_it_goes_on_by_itself(tmp_path):
    torchrun = start(
        "torchrun",
        "--standalone",
        "--nproc_per_node",
        2,
        "--max-restarts",
        2,
        ROOT / "train.py",
        "--config",
        "tiny",
        f"run_dir={tmp_path / 'r'}",
        "resume=auto",
        *SETTINGS,
    )
    printed = []
    try:
        for line in torchrun.stdout:
            printed.append(line)
            if line.startswith("step     14/") and sum(line.startswith("step     14/") for line in printed) == 1:
                os.kill(process_of(1, tmp_path / "r"), signal.SIGKILL)
        assert torchrun.wait(timeout=600) == 0, "".join(printed)
    finally:
        torchrun.stdout.close()
        torchrun.kill()
    assert any(re.match(r"resuming after step (8|12|16|20)\b", line) for line in printed)
    assert status(tmp_path / "r")["state"] == "done"
    run(tmp_path / "whole", *SETTINGS)
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")

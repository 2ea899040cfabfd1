"""slurm.sbatch on two nodes, without Slurm: `srun`, `scontrol` and `scancel` are replaced by scripts that do on this
machine what the real ones do on the nodes of a job. The batch script, what it starts and the signals are real.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.scripts import ROOT, SCRIPTS, environment, start, wait_for
from tests.training.runs import losses, run, status

pytestmark = pytest.mark.slow

# Options up to the command; then once for every node, each in a process group of its own, as slurmstepd does it. The
# exit code is the highest one.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    echo "$1" >>"$FAKE/srun.options"
    shift
done
set -m
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    echo $! >"$FAKE/task.$node"
done
highest=0
for node in 0 1; do
    code=0
    wait "$(cat "$FAKE/task.$node")" || code=$?
    highest=$((code > highest ? code : highest))
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then printf 'localhost\\nother\\n'; else echo "$@" >>"$FAKE/requeued"; fi
"""
SCANCEL = """#!/usr/bin/env bash
[ "$*" = "--signal=TERM 4711" ] && kill -TERM -- "-$(cat "$FAKE/task.0")" "-$(cat "$FAKE/task.1")"
"""


@pytest.fixture
def fake(tmp_path) -> Iterator[Path]:
    """A folder with the replaced commands; `requeued` appears there when the job is put back into the queue."""
    directory = tmp_path / "slurm"
    directory.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    yield directory
    for task in directory.glob("task.*"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(task.read_text()), signal.SIGTERM)


def sbatch(fake: Path, port: str, *arguments: object) -> subprocess.Popen:
    """The batch script as Slurm runs it: a copy, elsewhere, with the job's variables."""
    spooled = fake / "slurm_script"
    spooled.write_text((SCRIPTS / "slurm.sbatch").read_text())
    return start(
        "bash",
        spooled,
        "tiny",
        *arguments,
        cwd=fake,
        PATH=f"{fake}:{environment()['PATH']}",
        FAKE=str(fake),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="4711",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_PROCID="0",
        SLURM_NTASKS="2",
        MASTER_PORT=port,
    )


def test_a_job_whose_time_is_up_goes_on_in_the_next(fake, tmp_path, free_port):
    settings = ["train.steps=120", "checkpoint.every=20", "relora.restart_every=40"]
    run_dir = tmp_path / "run"
    job = sbatch(fake, free_port, *settings, f"run_dir={run_dir}")
    wait_for((run_dir / "checkpoints" / "latest").exists)
    job.send_signal(signal.SIGUSR1)
    printed = job.communicate(timeout=600)[0]
    assert (fake / "requeued").read_text() == "requeue 4711\n", printed
    assert "preempted: back into the queue" in printed  # all ranks saved where they were
    assert job.returncode == 0 and status(run_dir)["state"] != "done"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set((fake / "srun.options").read_text().split())

    job = sbatch(fake, free_port, *settings, f"run_dir={run_dir}")
    printed = job.communicate(timeout=600)[0]
    assert job.returncode == 0, printed
    assert status(run_dir)["state"] == "done" and (fake / "requeued").read_text() == "requeue 4711\n"
    run(tmp_path / "uninterrupted", *settings)
    assert losses(run_dir) == losses(tmp_path / "uninterrupted")
    assert {path.name for path in fake.iterdir()} == {
        "srun",
        "scontrol",
        "scancel",
        "slurm_script",
        "task.0",
        "task.1",
        "srun.options",
        "requeued",
    }  # no hostfile is left

"""Starting the launch scripts as a user does, in processes of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch_scripts"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "OMPI_", "PMI", "MPI_")


def environment(**more: str) -> dict[str, str]:
    """This environment without what a launcher puts there, with the Python of the tests first in PATH."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    return {**plain, "PATH": f"{Path(sys.executable).parent}:{plain['PATH']}", "OMP_NUM_THREADS": "1", **more}


def start(*command: object, cwd: Path = ROOT, **more: str) -> subprocess.Popen:
    """Start a command in a session of its own, `more` being added to its environment."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**more),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(*command: object, cwd: Path = ROOT, timeout: float = 600, **more: str) -> tuple[int, str]:
    """Run a command to its end: `(exit code, what it printed)`."""
    process = start(*command, cwd=cwd, **more)
    try:
        printed = process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
    return process.returncode, printed


def wait_for(what: Callable[[], bool], seconds: float = 600) -> None:
    """Until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)

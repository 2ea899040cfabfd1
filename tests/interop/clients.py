"""Other people's programs, each in an environment of its own, with pip and this environment's torch."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


class Client:
    """Python in a virtual environment. Skips the test where its packages cannot be installed.

    Args:
        directory: where to make the environment.
        packages: what pip installs. Everything else that they need is this environment's (`.pth`), after theirs.
    """

    def __init__(self, directory: Path, *packages: str, options: tuple[str, ...] = ()):
        subprocess.run([sys.executable, "-m", "venv", directory], check=True, timeout=300)
        self.bin = directory / "bin"
        pip = subprocess.run(
            [self.bin / "pip", "install", "--quiet", *options, *packages],
            capture_output=True,
            text=True,
            timeout=900,
            env=self._environment(),
        )
        if pip.returncode:
            pytest.skip(f"pip cannot install {', '.join(packages)}: {pip.stderr.strip().splitlines()[-1]}")
        [site] = directory.glob("lib/python*/site-packages")
        (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, program: str, **arguments):
        """Run `program` with `given`, a dict of the arguments, and return what it puts into `result`. As JSON."""
        lines = ("import json, sys", "given = json.load(sys.stdin)", program, "print('\\n' + json.dumps(result))")
        done = subprocess.run(
            [self.bin / "python", "-c", "\n".join(lines)],
            capture_output=True,
            text=True,
            timeout=600,
            input=json.dumps(arguments, default=str),
            env=self._environment(),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def _environment(self) -> dict[str, str]:
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        return {name: value for name, value in os.environ.items() if name not in hidden} | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }

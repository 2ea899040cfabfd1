"""A process whose results are read while it runs, and which ends with them, or with us."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Process:
    """A command that writes JSON lines into a file: its last argument, or what a variable of its environment names.

    Attributes:
        code: its exit code; None before it has ended by itself.
        last_words: its exit code and the end of what it printed, after `lines`.
    """

    def __init__(self, command: list[str], variable: str | None = None):
        self._command, self._variable = command, variable
        self.code: int | None = None
        self.last_words = ""

    def lines(self, seconds: float) -> Generator[dict, None, None]:
        """Run it, for at most `seconds`: each line when it is there. It is gone, with its children, when this ends."""
        with tempfile.TemporaryDirectory() as directory:
            lines, log = Path(directory, "lines"), Path(directory, "log")
            process = self._start(lines, log)
            try:
                yield from self._read(process, lines, time.monotonic() + seconds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                self.last_words = f"exit code {self.code}: " + "\n".join(said[-8:] or ["no message"])

    def _start(self, lines: Path, log: Path) -> subprocess.Popen:
        command = self._command if self._variable else [*self._command, str(lines)]
        more = {self._variable: str(lines)} if self._variable else {}
        prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: None)  # of Linux
        with log.open("w") as printed:
            return subprocess.Popen(
                command,
                env={**os.environ, **more},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Where we are killed, nobody is left to end it. torchrun passes the signal on to its ranks.
                preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    def _read(self, process: subprocess.Popen, lines: Path, until: float) -> Iterator[dict]:
        read = 0
        while time.monotonic() < until:
            code = process.poll()  # before the file is read, so that nothing is missed
            text = lines.read_text(encoding="utf-8") if lines.is_file() else ""
            whole = text[: text.rfind("\n") + 1].splitlines()
            for line in whole[read:]:
                read += 1
                yield json.loads(line)
            if code is not None:
                self.code = code
                return
            time.sleep(0.1)

"""Servers and islands of the tests."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

from relora_ds.islands.client import Link
from relora_ds.islands.server import Server

SECRET = "a secret for tests"
IDENTITY = {"relora.r": 8, "optim.lr": 1e-3}


class Served:
    """A server in a thread of this process.

    Attributes:
        address: where it listens.
        lines: what it has said.
    """

    def __init__(self, directory: Path, listen: str = "127.0.0.1:0", **options):
        self.lines: list[str] = []
        options = {"timeout_s": 60.0, "lease_s": 1.0, **options}
        self._server = Server(listen, directory, SECRET, say=self.lines.append, **options)
        self.address = self._server.address
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()

    def stop(self) -> None:
        self._server.stop()
        self._thread.join()


@contextlib.contextmanager
def serving(directory: Path, **options):
    served = Served(directory, **options)
    try:
        yield served
    finally:
        served.stop()


class Process:
    """A server in a process of its own, which can be killed and started again."""

    def __init__(self, directory: Path, port: int):
        self.address = f"tcp://127.0.0.1:{port}"
        code = (
            "import sys; from pathlib import Path; from relora_ds.islands.server import Server; "
            f"Server({self.address!r}, Path({str(directory)!r}), {SECRET!r}).run()"
        )
        self._command = [sys.executable, "-c", code]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        assert self._process.wait() == -signal.SIGKILL, "it had ended by itself"


def link(address: str, island: str, **changes) -> Link:
    arguments = {"incarnation": f"{island}-1", "rank": 0, "world_size": 1, "count": 2, "timeout_s": 30.0}
    secret = changes.pop("secret", SECRET)
    return Link(address, secret, island=island, **{**arguments, **changes})


@contextlib.contextmanager
def joined(address: str, *islands: str, identity=IDENTITY, done=0, **changes):
    """One rank of each island, joined."""
    links = [link(address, island, **changes) for island in islands]
    try:
        for one in links:
            one.join(identity, done)
        yield links
    finally:
        for one in links:
            one.close()


def blob(size: int, *of) -> bytes:
    """Bytes that belong to `of`."""
    return random.Random(repr(of)).randbytes(size)


def run_together(*functions) -> list:
    """Run functions in threads; returns their results, or raises what the first one raised."""
    results: list = [None] * len(functions)

    def call(number, function):
        try:
            results[number] = function()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=call, args=one) for one in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def is_open(descriptor_of: Path) -> bool:
    """Return whether this process has a file open."""
    return any(os.path.realpath(f"/proc/self/fd/{one}") == str(descriptor_of) for one in os.listdir("/proc/self/fd"))

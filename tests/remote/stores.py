"""A store in a directory, as fsspec sees one, that can refuse, be slow, or see its process die.

faulty:///tmp/store is the directory /tmp/store. Each of `FAULTS` sees every operation first.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

FAULTS: list[Callable[[str, str], object]] = []  # (operation, path)
PROTOCOL = "faulty"


class FaultyStore(LocalFileSystem):
    """Attributes: running: uploads that are under way now, in all threads; most: as many as there were at a time."""

    protocol = PROTOCOL
    running = most = 0
    _lock = threading.Lock()

    def __init__(self, **options):
        super().__init__(**{**options, "auto_mkdir": True})

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix(f"{PROTOCOL}://"))

    def put_file(self, lpath, rpath, **options):
        kind = type(self)
        is_weights = rpath.endswith(".safetensors")
        with self._lock:
            kind.running += is_weights
            kind.most = max(kind.most, kind.running)
        try:
            self._fault("put", rpath)
            super().put_file(lpath, rpath, **options)
        finally:
            with self._lock:
                kind.running -= is_weights

    def cat_file(self, path, **options):
        self._fault("read", path)
        return super().cat_file(path, **options)

    def get_file(self, rpath, lpath, **options):
        self._fault("get", rpath)
        super().get_file(rpath, lpath, **options)

    def find(self, path, **options):
        self._fault("find", path)
        return super().find(path, **options)

    def _fault(self, operation: str, path: str) -> None:
        for fault in FAULTS:
            fault(operation, path)


fsspec.register_implementation(PROTOCOL, FaultyStore, clobber=True)


def url(directory: Path) -> str:
    return f"{PROTOCOL}://{directory}"


def dies_after(done: str):
    """The process dies in the second upload of weights after an upload whose path ends so."""
    seen = []

    def fault(operation: str, path: str) -> None:
        if operation == "put" and (path.endswith(done) or (seen and path.endswith(".safetensors"))):
            seen.append(path)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    return fault


def fails(operation: str, part: str):
    """The store refuses what concerns these paths."""

    def fault(asked: str, path: str) -> None:
        if asked == operation and part in path:
            raise PermissionError(f"Access Denied: {Path(path).name}")

    return fault


def waits_for(path: str, part: str):
    """Uploads of weights to these paths wait until something is on the disk."""

    def fault(operation: str, target: str) -> None:
        deadline = time.monotonic() + 300
        while operation == "put" and target.endswith(".safetensors") and part in target and not os.path.exists(path):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return fault


def takes(seconds: float, part: str = ".safetensors"):
    """Every upload to these paths takes so long."""

    def fault(operation: str, path: str) -> None:
        if operation == "put" and part in path:
            time.sleep(seconds)

    return fault

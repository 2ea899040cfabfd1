"""Ranks that see the GPUs which all other tests are kept from."""

import functools
import subprocess
import sys

import torch

from tests.devices import show_gpus
from tests.ranks import Ranks

COUNT = "from tests.devices import show_gpus; show_gpus(); import torch; print(torch.cuda.device_count())"


@functools.cache
def number_of_gpus() -> int:
    """GPUs that PyTorch finds when nothing hides them."""
    if torch.version.cuda is None and torch.version.hip is None:
        return 0
    found = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=False)
    return int(found.stdout) if found.returncode == 0 else 0


@functools.cache
def gpus(world_size: int) -> Ranks:
    """The session's rank processes, each on a GPU of its own."""
    return Ranks(world_size, show_gpus)

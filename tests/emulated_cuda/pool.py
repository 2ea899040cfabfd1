"""Rank processes that live inside the emulation."""

import functools
import importlib.util
import os

from tests.ranks import Ranks


def _enter() -> None:
    """Begin the emulation, before anything asks whether there are GPUs; it ends with the process."""
    global _gpu
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401  (where there are GPUs it looks for a library that is not here)

    from tests.emulated_cuda.gpu import EmulatedCuda

    _gpu = EmulatedCuda().__enter__()


def gpu():
    """On a rank: the emulation that it is in."""
    return _gpu


@functools.cache
def emulated_ranks(world_size: int = 2) -> Ranks:
    """The session's emulated ranks."""
    return Ranks(world_size, _enter)

"""`torch.compile` for the training step.

What computes gradients is compiled. Evaluation, samples and the drift probe run as they are: their batches have
other shapes, each of which would be compiled for itself, which takes a minute or more. So do the few steps that are
watched operator by operator, to count the bytes that ranks exchange: torch.compile gives up for good what it meets in
one of those. And so does the step before a restart that chooses subspaces by the gradient: compiled code adds whole
gradients up, but hands no sketches on.
"""

import functools
import os
import shutil
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def problems() -> list[str]:
    """Return why this machine cannot compile: inductor writes C++ for CPUs, and triton starts kernels from C."""
    cuda = torch.cuda.is_available()
    variable, compilers = ("CC", ["gcc", "clang"]) if cuda else ("CXX", ["g++"])
    compilers = [os.environ[variable]] if variable in os.environ else compilers
    header = Path(sysconfig.get_path("include"), "Python.h")
    if cuda and not _has_triton():
        missing = "triton, which torch's CUDA builds bring, and a GPU of compute capability 7.0 or newer"
    elif not any(shutil.which(compiler) for compiler in compilers):
        missing = f"a compiler ({' or '.join(compilers)} is not found; {variable} names another one)"
    elif not header.exists():
        missing = f"Python's headers ({header} is not there; Linux distributions have them in python3-dev)"
    else:
        return []
    return [f"compile: true needs {missing}; install what is missing, or use compile=false"]


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


def apply(model: nn.Module, unless: Callable[[], bool] = lambda: False) -> nn.Module:
    """Compile the training forward of `model`, in place: at its first call, which takes minutes for a large model.

    Parameters' names, the class and hooks stay as they are. Weights that change in place, as at a restart, do not
    compile it again; other shapes of the batch do.

    Args:
        unless: whether the coming forward, and its backward, are to run as they are.
    """
    plain = model.forward.__func__  # type: ignore[attr-defined]  # not the class's: liger-kernel gives a model its own
    compiled = torch.compile(plain)

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        as_it_is = not torch.is_grad_enabled() or is_in_torch_dispatch_mode() or unless()
        return (plain if as_it_is else compiled)(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model

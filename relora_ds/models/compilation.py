"""`torch.compile` for the training step.

What computes gradients is compiled. Evaluation, samples and the drift probe run as they are: their batches have
other shapes, each of which would be compiled for itself, which takes a minute or more.
"""

import functools
import os
import shutil
import sysconfig
import types
from pathlib import Path

import torch
from torch import nn


def problems() -> list[str]:
    """Why this machine cannot compile."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton
        missing = None if has_triton() else "triton, which fits torch's version, and a GPU of compute capability 7.0"
    elif shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        missing = f"a C++ compiler ({compiler} is not found; CXX names another one)"
    elif not (header := Path(sysconfig.get_path("include"), "Python.h")).exists():
        missing = f"Python's headers ({header} is not there; Linux distributions have them in python3-dev)"
    else:
        missing = None
    return [f"compile: true needs {missing}; install it, or use compile=false"] if missing else []


def apply(model: nn.Module) -> nn.Module:
    """Compile the training forward of `model`, in place: at its first call, which takes minutes for a large model.

    Parameters' names, the class and hooks stay as they are. Weights that change in place, as at a restart, do not
    compile it again; other shapes of the batch do.
    """
    plain = model.forward.__func__  # not the class's: liger-kernel gives a model its own
    compiled = torch.compile(plain)

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        return (compiled if torch.is_grad_enabled() else plain)(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model

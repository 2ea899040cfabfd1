"""Tests run on the CPU, also on a machine with GPUs; those of tests/cuda have ranks of their own that see them.

hide_gpus()     from this process and all that it starts; before torch asks for them, which it does once
show_gpus()     in a process that a hidden one has started: as many as the user's environment shows
"""

import json
import os
from pathlib import Path

GUARD = Path(__file__).parent / "without_gpus"
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "DS_ACCELERATOR", "PYTHONPATH")
BEFORE = "RELORA_DS_TESTS_BEFORE"  # what they were, for processes that shall see GPUs
AMD_DRIVER = Path("/dev/kfd")


def hide_gpus() -> None:
    if BEFORE in os.environ:
        return  # pytest-xdist's worker, or a process of a test
    os.environ[BEFORE] = json.dumps({name: os.environ.get(name) for name in VARIABLES})
    os.environ.pop("DS_ACCELERATOR", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if AMD_DRIVER.exists():
        os.environ["HIP_VISIBLE_DEVICES"] = "-1"  # an empty one is as good as none there
    os.environ["PYTHONPATH"] = os.pathsep.join([str(GUARD), *filter(None, [os.environ.get("PYTHONPATH")])])


def show_gpus() -> None:
    for name, value in json.loads(os.environ.pop(BEFORE, "{}")).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value

"""A typing error in a recipe is refused at once, before anything that takes seconds to import."""

import os
import subprocess
import sys

import pytest

from relora_ds.config import PACKAGE_DIR

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "numpy")
PROBE = """
import sys
from relora_ds.__main__ import main
code = main(sys.argv[1:])
print(code, sorted(set({heavy!r}) & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "command",
    [["check", "quickstart"], ["estimate", "quickstart"], ["train", "quickstart"]],
    ids=lambda command: command[0],
)
def test_a_typing_error_costs_no_import_of_torch(command):
    done = _python("-c", PROBE.format(heavy=HEAVY), *command, "relora.rr=4", "optim.lr=-1")
    assert done.stdout.strip() == "2 []"
    assert "relora.rr: unknown key; did you mean relora.r?" in done.stderr and "optim.lr: -1.0" in done.stderr


def test_a_refusal_takes_less_than_half_a_second_of_cpu():
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'relora_ds', 'check', 'quickstart', 'relora.rr=4'])\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    seconds = min(float(_python("-c", code).stdout) for _ in range(2))  # the first may compile modules
    assert seconds < 0.5


def test_the_files_of_the_methods_need_no_torch():
    code = (
        "import sys\n"
        "from relora_ds.config.methods import METHODS, method_class\n"
        "assert all(method_class(name).name == name for name in METHODS)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    assert _python("-c", code).stdout.strip() == "[]"


def _python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_DIR.parent)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)

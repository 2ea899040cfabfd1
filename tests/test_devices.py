"""On a machine with GPUs the tests are what they are elsewhere."""

import json
import os
import subprocess
import sys

import pytest

from tests import devices
from tests.ranks import Ranks, ranks


def seen(environment) -> dict[str, str | None]:
    return {name: environment.get(name) for name in devices.VARIABLES}


def seen_here() -> dict[str, str | None]:
    return seen(os.environ)


def user_with_gpus(monkeypatch, **variables: str) -> dict[str, str | None]:
    """The user's environment as pytest finds it; returns what `seen` makes of it."""
    monkeypatch.delenv(devices.BEFORE, raising=False)
    for name in devices.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return seen(os.environ)


def test_this_process_and_its_ranks_see_no_gpu():
    import torch

    assert not torch.cuda.is_available() and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    (found,) = ranks(1).run(seen_here)
    assert found["CUDA_VISIBLE_DEVICES"] == "" and found["DS_ACCELERATOR"] in (None, "cpu")


@pytest.mark.parametrize(
    "variables", [{}, {"CUDA_VISIBLE_DEVICES": "0,1", "DS_ACCELERATOR": "cuda", "PYTHONPATH": "/somewhere"}]
)
def test_ranks_see_what_the_user_sees_when_they_shall(monkeypatch, variables):
    before = user_with_gpus(monkeypatch, **variables)
    devices.hide_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and "DS_ACCELERATOR" not in os.environ
    devices.hide_gpus()  # as in a worker of pytest-xdist
    code = (
        "import json; from tests.test_devices import devices, seen_here; devices.show_gpus(); "
        "print(json.dumps(seen_here()))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == before


def look_for_torch() -> None:
    os.environ["RELORA_DS_TESTS_TORCH"] = str("torch" in sys.modules)


def what_was_found() -> tuple:
    return os.environ.get("RELORA_DS_TESTS_TORCH"), "torch" in sys.modules


def test_ranks_are_prepared_before_they_import_torch():
    special = Ranks(1, look_for_torch)
    try:
        assert special.run(what_was_found) == [("False", True)]
    finally:
        special.stop()


def test_a_launcher_that_numbers_the_gpus_anew_shows_none():
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "''"


def test_amd_gpus_are_hidden_too(monkeypatch, tmp_path):
    user_with_gpus(monkeypatch)
    monkeypatch.setattr(devices, "AMD_DRIVER", tmp_path)
    devices.hide_gpus()
    assert os.environ["HIP_VISIBLE_DEVICES"] == "-1"

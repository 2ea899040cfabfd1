"""`doctor`, and `doctor --link` on two ranks and under a launcher's arguments."""

import contextlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from relora_ds.__main__ import main
from relora_ds.commands.doctor import _advice_as_text
from relora_ds.planning.advice import Advice, advise
from relora_ds.planning.link import Candidate, measure
from relora_ds.training.preflight import resolve
from relora_ds.utils.ports import free_port
from tests.ranks import ranks


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the hub is asked in tests/planning/test_machine.py


def test_versions_devices_backends(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "deepspeed", "gloo", "cores", "HF_HUB_OFFLINE", "this machine can train"):
        assert word in text


def test_json(capsys):
    assert main(["--local_rank=0", "doctor", "--json"]) == 0  # where the DeepSpeed launcher puts it
    found = json.loads(capsys.readouterr().out)
    assert found["essential_problems"] == [] and found["link"] is None
    assert {"section": "backends", "name": "gloo", "value": "available"} in found["facts"]


def test_what_is_essential_decides_the_exit_code(capsys, monkeypatch):
    from relora_ds.planning import machine

    monkeypatch.setattr(machine, "requirements", lambda: {"deepspeed": ">=99"})
    assert main(["doctor"]) == 1
    assert "this machine cannot train" in capsys.readouterr().out


def test_no_time_to_measure(capsys):
    assert main(["doctor", "--link", "--seconds", "0"]) == 1
    assert "--seconds" in capsys.readouterr().err


def advice_on_ranks() -> tuple[dict, list]:
    import torch

    link = measure(0.5, torch.device("cpu"))
    found = advise(
        resolve("tiny", ["relora.r=16", "train.batch_sequences=16"], 1, to_run=False), link, torch.device("cpu")
    )
    return vars(found.best), [vars(candidate) for candidate in found.candidates]


def test_advice_is_the_same_on_all_ranks():
    (best, candidates), other = ranks(2).run(advice_on_ranks)
    assert (best, candidates) == other
    assert {c["stage"] for c in candidates} == {0, 1, 2, 3} and {c["r"] for c in candidates} == {16, 8}
    assert {c["micro_batch_size"] for c in candidates} == {1, 2, 4, 8}
    assert best in candidates and best["tokens_per_s"] > 0


@pytest.mark.parametrize("rslora, alpha", [("false", 8), ("true", 16)])
def test_a_lower_rank_keeps_the_scaling(rslora, alpha):
    overrides = ["relora.r=16", "relora.lora_alpha=32", f"relora.use_rslora={rslora}"]
    resolved = resolve("tiny", overrides, 1, to_run=False)
    best = Candidate(stage=1, r=4, micro_batch_size=8, memory=1, compute=1, communication=1, tokens_per_s=1)
    (line, *_) = _advice_as_text("tiny", resolved, SimpleNamespace(world_size=2), Advice(best, [best], [], 9, 1))
    assert line.endswith(f"relora.r=4 relora.lora_alpha={alpha}")


@pytest.mark.slow
def test_one_rank_has_no_link():
    done = subprocess.run(
        [sys.executable, "-m", "relora_ds", "doctor", "--link"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 1 and "start at least two" in done.stderr and "torchrun" in done.stderr


@pytest.mark.slow
def test_under_torchrun():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        "-m",
        "relora_ds",
        "doctor",
        "--link",
        "--seconds",
        "2",
        "--config",
        "tiny",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["link"]
    assert found["world_size"] == 2 and found["recipe"] == "tiny" and found["advice"]["best"]["tokens_per_s"] > 0


def test_help_names_both_launchers():
    text = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(text):
        main(["doctor", "--help"])
    assert "torchrun" in text.getvalue() and "deepspeed" in text.getvalue()

"""Which devices are used, and which are refused; the answers of DeepSpeed and PyTorch are made up."""

import ast
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import deepspeed.accelerator
import pytest
import torch

from relora_ds.lab.bench.launch_local import launch_local
from relora_ds.train import main
from relora_ds.zero import accelerator
from relora_ds.zero.initialize import initialize
from relora_ds.zero.start import init_distributed
from tests.ranks import ranks
from tests.small_models import llama

PACKAGE = Path(accelerator.__file__).parent.parent
LAUNCHER = ("DS_ACCELERATOR", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture
def machine(monkeypatch):
    """Pretend: DeepSpeed's accelerator, GPUs by their compute capability, variables."""

    def pretend(name: str, gpus: tuple[tuple[int, int], ...] = (), **variables: str) -> None:
        for variable in LAUNCHER:
            monkeypatch.delenv(variable, raising=False)
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")

    return pretend


A100, V100 = (8, 0), (7, 0)


def test_a_rank_has_the_gpu_of_its_number(machine):
    machine("cuda", (A100, A100), LOCAL_RANK="1", LOCAL_SIZE="2")
    assert accelerator.problems() == [] and accelerator.backend() == "nccl" and accelerator.is_cuda()
    assert accelerator.device_of_rank() == torch.device("cuda", 1)


def test_without_a_gpu_it_is_the_cpu(machine):
    machine("cpu", LOCAL_RANK="5")
    assert accelerator.problems() == [] and accelerator.backend() == "gloo" and not accelerator.is_cuda()
    assert accelerator.device_of_rank() == torch.device("cpu")


REFUSED = {
    "xpu": ("xpu", (), {}, "accelerator: DeepSpeed would compute on xpu devices"),
    "npu by its variable": ("cpu", (), {"DS_ACCELERATOR": "npu"}, "accelerator: DeepSpeed would compute on npu"),
    "hpu": ("hpu", (), {}, "on hpu devices"),
    "mps": ("mps", (), {}, "set DS_ACCELERATOR=cpu to train on the CPU"),
    "the CPU beside a GPU": (
        "cpu",
        (A100,),
        {"DS_ACCELERATOR": "cpu"},
        'CUDA_VISIBLE_DEVICES="" to train on the CPU, and start with torchrun or single_node.sh',
    ),
    "a GPU that is not there": ("cuda", (), {"DS_ACCELERATOR": "cuda"}, "cuda, but PyTorch sees no GPU here"),
    "DeepSpeed's ranks": ("cuda", (A100,) * 2, {"LOCAL_SIZE": "8"}, "LOCAL_RANK: 8 ranks on this machine"),
    "torchrun's ranks": ("cuda", (A100,) * 2, {"LOCAL_WORLD_SIZE": "3"}, "start 2 (deepspeed --num_gpus 2"),
    "a rank beyond the GPUs": ("cuda", (A100,), {"LOCAL_RANK": "1"}, "PyTorch sees 1 GPU(s) here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(machine, case):
    name, gpus, variables, message = REFUSED[case]
    machine(name, gpus, **variables)
    (found,) = accelerator.problems()
    assert message in found and "\n" not in found


def test_benchmarks_do_not_start_more_ranks_than_there_are_gpus(machine, monkeypatch):
    machine("cuda", (A100,))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="^LOCAL_RANK: 2 ranks on this machine, but PyTorch sees 1 GPU"):
        launch_local("relora_ds.lab.bench.restart_time", Namespace(), 2)


def test_a_run_is_refused_before_anything_begins(machine, tmp_path, capfd):
    machine("xpu", LOCAL_RANK="0")
    assert main(["--config", "tiny", f"run_dir={tmp_path / 'run'}"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert [line.startswith("error: accelerator: DeepSpeed would compute on xpu devices") for line in said] == [True]
    assert not (tmp_path / "run").exists()


def test_the_process_group_is_refused(machine):
    machine("cpu", (A100,))
    with pytest.raises(ValueError, match="DS_ACCELERATOR: cpu keeps DeepSpeed off the GPUs"):
        init_distributed()


def test_every_gpu_that_has_a_rank_is_asked_for_bf16(machine):
    machine("cuda", (A100, V100), LOCAL_SIZE="2", LOCAL_RANK="0")
    (found,) = accelerator.precision_problems("bf16")
    assert "GPU 1 (card 1, compute capability 7.0) only emulates it" in found
    assert not accelerator.computes_bf16() and accelerator.precision_problems("fp16") == []
    machine("cuda", (A100, V100), LOCAL_SIZE="1", LOCAL_RANK="0")
    assert accelerator.computes_bf16() and accelerator.precision_problems("bf16") == []


def initialize_without_bf16() -> None:
    with (
        mock.patch.object(accelerator, "precision_problems", lambda precision: [f"precision: {precision}, but no"]),
        pytest.raises(ValueError, match="^precision: bf16, but no$"),
    ):
        initialize(llama(), {"zero_optimization": {"stage": 1}}, lr=1e-3, total_steps=2, precision="bf16")


def test_it_is_refused_by_the_trainer_and_by_initialize(monkeypatch, tmp_path, capfd):
    ranks(1).run(initialize_without_bf16)
    monkeypatch.setattr(accelerator, "precision_problems", lambda precision: [f"precision: {precision}, but no"])
    assert main(["--config", "tiny", "precision=bf16", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "precision: bf16, but no" in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_bf16_on_the_cpu_may_be_asked_for_but_is_not_chosen(machine):
    machine("cpu")
    assert accelerator.precision_problems("bf16") == [] and not accelerator.computes_bf16()


def test_nothing_below_asks_pytorch_on_its_own():
    """In the rooms that build engines, whether there is a GPU is `accelerator`'s to say."""
    files = [path for room in ("zero", "training", "checkpoint", "methods") for path in (PACKAGE / room).rglob("*.py")]
    asking = {
        path.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda.is_available"
    }
    assert asking == {"accelerator.py"}

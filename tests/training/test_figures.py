"""MFU and memory in the log line: where they are known."""

from types import SimpleNamespace

import pytest
import torch

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.wrap import wrap
from relora_ds.models.flops import PEAK_FLOPS
from relora_ds.training import figures
from relora_ds.training.figures import mfu, model_flops_per_token
from relora_ds.training.hooks.console import figures_text
from tests.small_models import llama

FIGURES = {"loss": 3.25, "lr": 1e-3, "tokens_per_s": 12345.6, "mfu": None, "peak_memory_bytes": 2**31}


def test_flops_are_those_of_what_is_multiplied():
    """6 for a trainable element, 4 for a frozen one, none for the embedding, which is looked up."""
    model, config = llama(), llama().config
    attention = 6 * config.num_hidden_layers * config.hidden_size * 8
    embedding = config.vocab_size * config.hidden_size
    total = sum(p.numel() for p in model.parameters())
    assert model_flops_per_token(model, 8) == 6 * (total - embedding) + attention
    wrapped = wrap(model, ReLoRAConfig(r=2, trainable_modules=[]))
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in wrapped.parameters() if not p.requires_grad) - embedding
    assert model_flops_per_token(wrapped, 8) == 6 * trainable + 4 * frozen + attention


def test_a_mixture_of_experts_has_no_count():
    model = llama()
    model.config.num_local_experts = 8
    assert model_flops_per_token(model, 8) is None


def a_run(device="cuda", precision="bf16", flops=1e9):
    return SimpleNamespace(
        engine=SimpleNamespace(device=torch.device(device)),
        plan=SimpleNamespace(precision=precision),
        flops_per_token=flops,
    )


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(figures.dist, "get_world_size", lambda: 4)


def test_mfu_is_the_share_of_all_devices_peak(h100):
    assert mfu(a_run(), 1e6) == pytest.approx(1e9 * 1e6 / (4 * PEAK_FLOPS["H100"]))


def test_no_mfu_is_better_than_a_wrong_one(h100, monkeypatch):
    assert mfu(a_run(device="cpu"), 1e6) is None
    assert mfu(a_run(precision="fp32"), 1e6) is None
    assert mfu(a_run(flops=None), 1e6) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other Card")
    assert mfu(a_run(), 1e6) is None


def test_the_log_line_has_mfu_where_it_is_known_and_the_peak_of_memory_on_a_gpu():
    assert figures_text(FIGURES, on_gpu=False) == "loss 3.2500  lr 1.0e-03  12,346 tok/s"
    line = figures_text(FIGURES | {"mfu": 0.4321}, on_gpu=True)
    assert line == "loss 3.2500  lr 1.0e-03  12,346 tok/s  MFU 43.2 %  peak 2.15 GB"

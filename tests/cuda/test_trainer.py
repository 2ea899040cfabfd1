"""Whole runs on GPUs, from tokens to the exported model."""

import pytest
import torch

from tests.cuda.gpus import WORLD_SIZES, on_gpus
from tests.training.runs import lines, losses, train

OVERRIDES = [
    "train.steps=24",
    "warm_start_steps=6",
    "relora.restart_every=6",
    "relora.restart_warmup_steps=1",
    "optim.warmup_steps=2",
    "log.every=2",
    "eval.every=12",
    "checkpoint.every=12",
    "eval.samples=0",
]
EARLIER = 1 << 30  # bytes


def train_after_a_larger_peak(overrides: list[str]) -> dict:
    """Train a tiny recipe in a process that has had EARLIER bytes on its GPU before."""
    torch.empty(EARLIER, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
    return train("tiny", overrides)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run(stage, world_size, tmp_path):
    run = tmp_path / "run"
    on_gpus(world_size, train_after_a_larger_peak, [f"run_dir={run}", f"deepspeed=zero{stage}", *OVERRIDES])
    found = losses(run)
    assert found[24] < found[2] and len(lines(run, "restart")) == 2
    peaks = [line["peak_memory_bytes"] for line in lines(run, "train")]
    assert 0 < max(peaks) < EARLIER, "the peak is that of what was before"
    assert list(run.glob("export/*.safetensors"))

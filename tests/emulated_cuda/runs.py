"""What runs on the emulated ranks: the trainer, watched step by step."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from relora_ds.training.hooks import Hook
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.emulated_cuda.engines import live_bytes
from tests.emulated_cuda.pool import gpu


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Attributes:
        waits: how often the host waited for the GPU, by the place that made it wait.
        peak: bytes on the GPU at its peak beyond what was there before.
    """

    waits: dict[str, int]
    peak: int


class Watch(Hook):
    """Keeps what the steps did."""

    def __init__(self):
        self.steps: list[Step] = []

    @contextmanager
    def around_step(self, run):
        emulation, before = gpu(), torch.cuda.memory_allocated()
        emulation.syncs.clear()
        emulation.memory.reset_peak(emulation.current)
        yield
        self.steps.append(Step(emulation.syncs.places(), torch.cuda.max_memory_allocated() - before))


def train(overrides: list[str], vocabulary: int | None = None) -> tuple[list[Step], int]:
    """Train the tiny recipe; returns its steps, and the bytes that are left on the GPU.

    vocabulary: of the model, if not the tokenizer's.
    """
    before = live_bytes()
    plan = check("tiny", overrides)
    plan.model_config.vocab_size = vocabulary or plan.model_config.vocab_size
    watch = Watch()
    Trainer(plan, [watch]).fit()
    return watch.steps, live_bytes() - before

"""What runs on the emulated ranks: the trainer, watched step by step."""

from dataclasses import dataclass

import torch

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


class WatchedTrainer(Trainer):
    """A trainer that keeps what its steps did."""

    def __init__(self, plan):
        super().__init__(plan)
        self.steps: list[Step] = []

    def _train_step(self) -> None:
        emulation, before = gpu(), torch.cuda.memory_allocated()
        emulation.syncs.clear()
        emulation.memory.reset_peak(emulation.current)
        super()._train_step()
        self.steps.append(Step(emulation.syncs.places(), torch.cuda.max_memory_allocated() - before))


def train(overrides: list[str], vocabulary: int | None = None) -> tuple[list[Step], int]:
    """Train the tiny recipe; returns its steps, and the bytes that are left on the GPU.

    vocabulary: of the model, if not the tokenizer's.
    """
    before = live_bytes()
    plan = check("tiny", overrides)
    plan.model_config.vocab_size = vocabulary or plan.model_config.vocab_size
    trainer = WatchedTrainer(plan)
    trainer.fit()
    steps = trainer.steps
    del trainer
    return steps, live_bytes() - before

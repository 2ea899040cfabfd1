"""What a training step leaves alive, and what it waits for."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from relora_ds.training import batches, figures, probe, trainer
from relora_ds.training.hooks import Hook
from relora_ds.training.preflight import check
from relora_ds.training.step import take_step
from relora_ds.training.trainer import Trainer
from relora_ds.zero.initialize import initialize
from relora_ds.zero.teardown import release
from tests.peak_bytes import PeakBytes
from tests.ranks import ranks
from tests.small_models import batch, llama
from tests.training.runs import losses, train

SETTINGS = ["train.steps=24", "eval.samples=1", "train.batch_sequences=8", "train.micro_batch_size=2"]


class LogitsAlive(Hook):
    """Attributes: alive: at the beginning of each forward, how many logits of those before it are still there."""

    def __init__(self):
        self.made, self.alive = [], []

    def on_phase(self, run):
        run.engine.module.register_forward_pre_hook(
            lambda *_: self.alive.append(sum(storage() is not None for storage in self.made))
        )
        run.engine.module.register_forward_hook(
            lambda _module, _inputs, output: self.made.append(weakref.ref(output.logits.untyped_storage()))
        )


def logits_alive(overrides: list[str]) -> list[int]:
    hook = LogitsAlive()
    Trainer(check("tiny", overrides), [hook]).fit()
    return hook.alive


@pytest.mark.parametrize("stage", [pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_logits_are_gone_before_the_next_ones_are_made(stage, tmp_path):
    """In steps, evaluations, samples and the drift's probe."""
    (alive,) = ranks(1).run(logits_alive, [f"run_dir={tmp_path / 'run'}", f"deepspeed={stage}", *SETTINGS])
    assert len(alive) > 4 * 24 and set(alive) == {0}


def bytes_a_logit(rows=4, length=32, vocab_size=8192) -> float:
    """On a rank: the most bytes of the trainer's steps, per logit, of a bf16 model that is little else than logits."""
    model = llama(vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    engine, *_ = initialize(model, "zero1", lr=1e-3, total_steps=9, precision="bf16", micro_batch_size=rows)
    ids = batch(0, rows, vocab_size, length)
    run = SimpleNamespace(
        engine=engine,
        totals=SimpleNamespace(step=0),
        loader=SimpleNamespace(next_step=lambda is_last: [{"input_ids": ids, "labels": ids}]),
        losses=SimpleNamespace(spikes=SimpleNamespace(screens=False)),
        plan=SimpleNamespace(accumulation=1, recipe=SimpleNamespace(total_steps=9)),
    )
    take_step(run)
    with PeakBytes() as memory:
        for _ in range(3):
            take_step(run)
    release(engine)
    return memory.peak / (rows * length * vocab_size)


def test_a_step_takes_the_bytes_of_one_micro_batch_of_logits():
    """The loss in fp32 and its gradient; the logits of the micro-batch before would be 2 more."""
    (found,) = ranks(1).run(bytes_a_logit)
    assert 12 < found < 12.5


def train_ahead(overrides: list[str]) -> dict:
    """On a rank: train with batches that are made ahead, as for a GPU."""
    batches.is_cuda, pin = lambda: True, torch.Tensor.pin_memory
    torch.Tensor.pin_memory = lambda self: self
    try:
        return train("tiny", overrides)
    finally:
        batches.is_cuda, torch.Tensor.pin_memory = is_cuda, pin


is_cuda = batches.is_cuda


@pytest.mark.slow
def test_batches_made_ahead_change_no_loss_and_no_resume(tmp_path):
    settings = [*SETTINGS, "checkpoint.every=9", "eval.samples=0"]
    ranks(2).run(train, "tiny", [f"run_dir={tmp_path / 'plain'}", *settings])
    ranks(2).run(train_ahead, [f"run_dir={tmp_path / 'ahead'}", *settings])
    assert losses(tmp_path / "ahead") == losses(tmp_path / "plain")
    checkpoint = tmp_path / "ahead" / "checkpoints" / "step_00000018"
    ranks(2).run(train_ahead, [f"run_dir={tmp_path / 'on'}", *settings, f"resume={checkpoint}"])
    assert losses(tmp_path / "on") == {step: loss for step, loss in losses(tmp_path / "plain").items() if step > 18}


def phases_with_a_peak_of_their_own(overrides: list[str]) -> list[str]:
    """On a rank: train; the phases that began to measure their memory, at the first step of each."""
    plan, begun = check("tiny", overrides), []
    run = Trainer(plan)
    real, trainer.begin_peak_memory = trainer.begin_peak_memory, lambda device: begun.append(run.run.phase.name)
    try:
        run.fit()
    finally:
        trainer.begin_peak_memory = real
    return begun


def test_each_phase_has_a_peak_of_memory_of_its_own(tmp_path, monkeypatch):
    settings = [f"run_dir={tmp_path / 'run'}", "train.steps=14", "optim.warmup_steps=1", "eval.samples=0"]
    assert ranks(1).run(phases_with_a_peak_of_their_own, settings) == [["warm_start", "relora"]]
    forgotten = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    figures.begin_peak_memory(torch.device("cuda", 1))
    figures.begin_peak_memory(torch.device("cpu"))
    assert forgotten == [torch.device("cuda", 1)]


class Engine:
    device = torch.device("cpu")

    def __init__(self, module):
        self.module = module


def test_the_drift_is_measured_on_the_last_positions_whether_or_not_a_model_can_leave_out_the_others(monkeypatch):
    monkeypatch.setattr(probe, "POSITIONS", 4)
    model = llama().eval()
    tokens = torch.arange(40).numpy()
    with torch.no_grad():
        whole = model(input_ids=torch.arange(36).view(3, 12)).logits[:, -4:]
        found = probe.drift_probe(Engine(model), tokens, seq_len=12, micro_batch_size=9)()
        forward = model.forward
        model.forward = lambda input_ids: forward(input_ids=input_ids)
        other = probe.drift_probe(Engine(model), tokens, seq_len=12, micro_batch_size=9)()
    assert torch.equal(other, whole) and torch.allclose(found, whole, atol=1e-6)
    assert other.untyped_storage().nbytes() == found.untyped_storage().nbytes() == whole.numel() * 4
    assert probe.drift_probe(Engine(model), tokens[:11], seq_len=12, micro_batch_size=9) is None

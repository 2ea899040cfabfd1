"""The validation loss: the same bits in less memory, and a batch too large for it is noticed after the first step."""

import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.data import PreparedData
from relora_ds.training import validation
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from relora_ds.zero.teardown import release
from tests.peak_bytes import PeakBytes
from tests.ranks import ranks
from tests.small_models import batch, llama
from tests.training.runs import lines

CPU = torch.device("cpu")
LENGTH, ROWS, VOCAB = 32, 4, 2048


def data(batches: int):
    tokens = batch(0, 1, VOCAB, batches * ROWS * (LENGTH - 1) + 1)[0].numpy()
    return PreparedData(
        train=tokens[:0],
        validation=tokens,
        validation_words=10,
        validation_bytes=50,
        tokenizer_dir="",
        vocab_size=VOCAB,
        eos_id=0,
        fingerprint="",
        directory=Path(),
    )


def evaluate(model, batches: int = 1):
    return validation.evaluate(model, data(batches), seq_len=LENGTH, micro_batch_size=ROWS, device=CPU)


@pytest.mark.parametrize("at_once", [1, 5 * VOCAB, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_in_parts_have_the_bits_of_all_at_once(dtype, at_once, monkeypatch):
    monkeypatch.setattr(validation, "LOGITS_AT_ONCE", at_once)
    logits, labels = 3 * torch.randn(3, 7, VOCAB, generator=torch.Generator().manual_seed(0)), batch(0, 3, VOCAB, 7)
    logits, labels[1, 4:] = logits.to(dtype), -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    assert torch.equal(validation._losses(logits, labels), expected)


def test_an_evaluation_takes_less_memory_than_a_training_step_however_many_batches_it_has(monkeypatch):
    monkeypatch.setattr(validation, "LOGITS_AT_ONCE", VOCAB)
    model = llama(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1).bfloat16()
    logits = 2 * ROWS * LENGTH * VOCAB
    with PeakBytes() as one:
        evaluate(model)
    with PeakBytes() as three:
        evaluate(model, batches=3)
    ids = batch(0, ROWS, VOCAB, LENGTH)
    with PeakBytes() as training:
        model(input_ids=ids, labels=ids).loss.backward()
    assert logits < one.peak <= three.peak < 1.25 * logits < training.peak / 2


class Fused(nn.Module):
    """Takes what liger-kernel's forward functions take; makes logits only if it is not told to skip them."""

    def __init__(self):
        super().__init__()
        self.inner, self.router = llama(vocab_size=VOCAB), 7.0

    def forward(self, input_ids, labels=None, skip_logits=None, num_items_in_batch=None, output_router_logits=True):
        assert skip_logits and not self.training
        logits = self.inner(input_ids=input_ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return types.SimpleNamespace(loss=loss / num_items_in_batch + output_router_logits * self.router)


def test_a_model_that_makes_no_logits_for_its_loss_is_asked_for_the_loss():
    model = Fused().train()
    found, expected = evaluate(model, 3), evaluate(model.inner, 3)
    assert model.training
    assert found.val_loss == pytest.approx(expected.val_loss, rel=1e-6) and found.val_tokens == expected.val_tokens


def test_a_rehearsal_that_does_not_fit_names_the_field_and_leaves_the_mode():
    class TooLarge(nn.Module):
        def forward(self, input_ids):
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    model = TooLarge().train()
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"train.micro_batch_size: 4 sequences of 32 tokens .*; lower it \("
        r"Tried to allocate 2.00 GiB\)",
    ):
        validation.rehearse(model, data(1), seq_len=LENGTH, micro_batch_size=ROWS, device=CPU)
    assert model.training


def without_room(overrides: list[str]) -> str:
    """On a rank: train where no evaluation fits."""
    real = validation._losses

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    trainer, validation._losses = Trainer(check("tiny", overrides)), fail
    try:
        trainer.fit()
    except torch.OutOfMemoryError as error:
        trainer.checkpoints.writer.close()
        release(trainer.run.engine)
        return str(error)
    finally:
        validation._losses = real
    return "it trained"


def test_an_evaluation_that_does_not_fit_ends_the_run_after_its_first_step(tmp_path):
    (said,) = ranks(1).run(without_room, [f"run_dir={tmp_path / 'run'}"])
    assert said.startswith("train.micro_batch_size: ") and len(lines(tmp_path / "run", "train")) == 1

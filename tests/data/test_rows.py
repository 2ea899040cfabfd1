"""One document a row, padded: what is in the rows, and that nothing depends on how they are dealt out."""

import itertools

import numpy as np
import pytest
import torch

from relora_ds.data import TrainLoader, evaluation_batches, rows
from relora_ds.data.rows import PaddedRows, Padding
from relora_ds.training.validation import evaluate
from tests.ranks import ranks
from tests.small_models import llama

EOS, PAD = 2, 3
PADDING = Padding(EOS, PAD)
SEQ_LEN = 6


def tokens_of(lengths):
    """Documents of so many tokens, EOS included; the first token of each names it."""
    documents = [[10 + number, *range(11, 9 + length)][: length - 1] + [EOS] for number, length in enumerate(lengths)]
    return np.array(list(itertools.chain(*documents)), dtype=np.uint16)


LENGTHS = [3, 9, 1, 2, 6, 7, 4, 5, 1, 12, 3, 3, 8, 2]  # two of them are nothing but EOS
TOKENS = tokens_of(LENGTHS)


@pytest.mark.parametrize("at_a_time", [3, 7, 1 << 26])
def test_rows_are_documents_cut_or_padded(monkeypatch, at_a_time):
    monkeypatch.setattr(rows, "TOKENS_AT_A_TIME", at_a_time)
    padded = PaddedRows(TOKENS, SEQ_LEN, PADDING)
    lengths = [min(length, SEQ_LEN) for length in LENGTHS if length > 1]
    assert len(padded) == len(lengths)
    batch = padded.batch(np.array([*range(len(padded)), -1]))
    for row, length in enumerate([*lengths, 0]):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        assert ids[:length] == labels[:length] and EOS not in ids[: max(length - 1, 0)]
        assert ids[length:] == [PAD] * (SEQ_LEN - length) and labels[length:] == [-100] * (SEQ_LEN - length)
    assert batch["input_ids"][0].tolist() == [10, 11, EOS, PAD, PAD, PAD]
    assert (
        padded.num_predicted(np.arange(len(padded)))
        == sum(lengths) - len(lengths)
        == int((batch["labels"][:, 1:] != -100).sum())
    )


def test_a_last_document_that_max_tokens_cut_counts():
    assert len(PaddedRows(TOKENS[:11], SEQ_LEN, PADDING)) == 2
    assert PaddedRows(TOKENS[:11], SEQ_LEN, PADDING).num_predicted(np.array([1])) == 5
    assert len(PaddedRows(TOKENS[:4], SEQ_LEN, PADDING)) == 1, "one token of a document predicts nothing"


def steps(num_steps, micro_batch_size, world_size, state=None):
    """Rows per step in global order, put together from all ranks, and the sums of num_items over micro-batches."""
    loaders = [
        TrainLoader(TOKENS, SEQ_LEN, 6, micro_batch_size, rank, world_size, 0, PADDING) for rank in range(world_size)
    ]
    found = []
    for loader in loaders:
        loader.load_state_dict(state or loader.state_dict())
    for _ in range(num_steps):
        batches = list(itertools.chain(*zip(*(loader.next_step() for loader in loaders), strict=True)))
        labels = torch.cat([batch["labels"] for batch in batches])
        found.append(
            (
                torch.cat([batch["input_ids"] for batch in batches]).tolist(),
                round(sum(batch["num_items_in_batch"].item() for batch in batches), 4),
                int((labels[:, 1:] != -100).sum()),
            )
        )
    return found, loaders[0].state_dict()


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(6, 1), (1, 1), (3, 2), (1, 3), (2, 3)])
def test_order_state_and_weights_do_not_depend_on_ranks_or_micro_batches(micro_batch_size, world_size):
    expected, state = steps(5, 2, 1)
    found, same_state = steps(5, micro_batch_size, world_size)
    assert found == expected and same_state == state
    assert all(items == predicted for _, items, predicted in expected)
    assert steps(2, micro_batch_size, world_size, steps(3, 2, 1)[1])[0] == expected[3:]


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(1, 1), (5, 1), (2, 2), (4, 3)])
def test_evaluation_predicts_every_row_once(micro_batch_size, world_size):
    found = [
        list(evaluation_batches(TOKENS, SEQ_LEN, micro_batch_size, rank, world_size, PADDING))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in found}) == 1, "collectives must match"
    labels = torch.cat([batch["labels"] for batch in itertools.chain(*found)])
    real = labels[(labels != -100).any(1)].tolist()
    whole = PaddedRows(TOKENS, SEQ_LEN, PADDING)
    assert sorted(real) == sorted(whole.batch(np.arange(len(whole)))["labels"].tolist())


def losses_of(micro_batch_size):
    """On a rank: the gradient's norm and loss of one step, summed as DeepSpeed does, and the validation loss."""
    import torch.distributed as dist

    model = llama()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loader = TrainLoader(TOKENS, SEQ_LEN, 6, micro_batch_size, rank, world_size, 0, PADDING)
    batches = loader.next_step()
    total = torch.zeros(())
    for batch in batches:
        loss = model(**batch).loss / len(batches)
        loss.backward()
        total += loss.detach()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    for tensor in (total, gradients):
        dist.all_reduce(tensor)
        tensor /= world_size

    class Data:
        validation, validation_words, validation_bytes = TOKENS, 10, 50
        layout = padding = PADDING
        sets = ()

        @staticmethod
        def validation_parts():
            return [(None, TOKENS)]

    result = evaluate(model, Data, seq_len=SEQ_LEN, micro_batch_size=micro_batch_size, device=torch.device("cpu"))
    return (
        total.item(),
        gradients.norm().item(),
        gradients[:50].tolist(),
        result.val_loss,
        result.val_tokens,
        result.galore_loss,
    )


def test_loss_gradient_and_evaluation_are_means_over_real_tokens():
    """Two ranks, and micro-batches of other sizes: the same as all rows at once, padding and grouping left out."""
    model = llama()
    loader = TrainLoader(TOKENS, SEQ_LEN, 6, 6, 0, 1, 0, PADDING)
    (batch,) = loader.next_step()
    nats, count = 0.0, 0
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):  # each document alone, without padding
        length = int((labels != -100).sum())
        alone = model(input_ids=ids[None, :length], labels=ids[None, :length].clone())
        nats, count = nats + alone.loss * (length - 1), count + length - 1
    (nats / count).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    for micro_batch_size in (1, 3):
        loss, norm, first, val_loss, val_tokens, galore_loss = ranks(2).run(losses_of, micro_batch_size)[0]
        assert loss == pytest.approx((nats / count).item(), rel=1e-6)
        assert norm == pytest.approx(gradients.norm().item(), rel=1e-5)
        torch.testing.assert_close(torch.tensor(first), gradients[:50], rtol=1e-4, atol=1e-8)
        assert val_tokens == sum(min(length, SEQ_LEN) - 1 for length in LENGTHS)
        assert galore_loss == pytest.approx(as_galores_code_counts(model, micro_batch_size, num_ranks=2), rel=1e-5)
    assert val_loss == pytest.approx(ranks(2).run(losses_of, 1)[1][3], rel=1e-12)


def as_galores_code_counts(model, micro_batch_size: int, num_ranks: int) -> float:
    """Batches dealt to the ranks in turn; each rank's means over a counter that began at 1; the mean over ranks."""
    rows = PaddedRows(TOKENS, SEQ_LEN, PADDING)
    found = []
    for rank in range(num_ranks):
        total, batches = 0.0, 1
        for first in range(rank * micro_batch_size, len(rows), micro_batch_size * num_ranks):
            batch = rows.batch(np.arange(first, min(first + micro_batch_size, len(rows))))
            total, batches = total + model(**batch).loss.item(), batches + 1
        found.append(total / batches)
    return sum(found) / num_ranks


def test_too_few_documents_is_a_clear_error():
    with pytest.raises(ValueError, match=r"13 is more than the 12 documents \(data.packing=false\) in the corpus"):
        TrainLoader(TOKENS, SEQ_LEN, 13, 1, 0, 1, 0, PADDING)
    with pytest.raises(ValueError, match="leave nothing to predict"):
        next(evaluation_batches(np.array([EOS, EOS], dtype=np.uint16), SEQ_LEN, 1, 0, 1, PADDING))

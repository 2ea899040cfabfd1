"""The global order, resuming, and evaluation that predicts every token once."""

import itertools

import numpy as np
import pytest
import torch

from relora_ds.data import TrainLoader, evaluation_batches

SEQ_LEN = 4
TOKENS = np.arange(32 * SEQ_LEN + 3, dtype=np.uint16)  # 32 sequences; a sequence's first token names it


def steps(num_steps, micro_batch_size, world_size, batch_sequences=12, seed=0, state=None, tokens=TOKENS):
    """Sequences per step in global order, put together from all ranks."""
    loaders = [
        TrainLoader(tokens, SEQ_LEN, batch_sequences, micro_batch_size, rank, world_size, seed)
        for rank in range(world_size)
    ]
    for loader in loaders:
        loader.load_state_dict(state or loader.state_dict())
    result = []
    for _ in range(num_steps):
        micro_steps = zip(*(loader.next_step() for loader in loaders), strict=True)
        rows = torch.cat([batch["input_ids"] for ranks in micro_steps for batch in ranks])
        result.append([row[0] // SEQ_LEN for row in rows.tolist()])
    assert len({tuple(loader.state_dict().items()) for loader in loaders}) == 1
    return result


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(12, 1), (1, 1), (3, 2), (2, 3), (1, 4), (6, 2)])
def test_order_does_not_depend_on_ranks_or_micro_batches(micro_batch_size, world_size):
    assert steps(8, micro_batch_size, world_size) == steps(8, 4, 1)


def test_every_epoch_is_a_new_permutation_and_batches_straddle():
    order = list(itertools.chain(*steps(8, 12, 1)))  # 96 sequences, 3 epochs of 32
    epochs = [order[start : start + 32] for start in (0, 32, 64)]
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order != list(itertools.chain(*steps(8, 12, 1, seed=1)))


def test_batches_are_windows_with_labels():
    (first, second) = TrainLoader(TOKENS, SEQ_LEN, 12, 3, 1, 2, seed=0).next_step()
    assert first.keys() == {"input_ids", "labels"}
    for batch in (first, second):
        assert batch["input_ids"].shape == (3, SEQ_LEN) and batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
        assert torch.equal(batch["input_ids"] - batch["input_ids"][:, :1], torch.arange(SEQ_LEN).expand(3, -1))


@pytest.mark.parametrize("done", [1, 2, 3, 5])
def test_resume_equals_uninterrupted_also_on_other_ranks(done):
    loader = TrainLoader(TOKENS, SEQ_LEN, 12, 2, 0, 1, seed=3)
    for _ in range(done):
        loader.next_step()
    state = loader.state_dict()
    assert state == {"epoch": done * 12 // 32, "position": done * 12 % 32}
    assert steps(8 - done, 3, 2, seed=3, state=state) == steps(8, 2, 1, seed=3)[done:]


def test_loader_errors():
    with pytest.raises(ValueError, match="train.batch_sequences: 10 is not a multiple of 8 .*; use 8 or 16"):
        TrainLoader(TOKENS, SEQ_LEN, 10, 4, 0, 2, seed=0)
    with pytest.raises(ValueError, match="train.batch_sequences: 3 is not a multiple of 8 .*; use 8, or"):
        TrainLoader(TOKENS, SEQ_LEN, 3, 4, 0, 2, seed=0)
    with pytest.raises(ValueError, match="33 is more than the 32 sequences of 4 tokens"):
        TrainLoader(TOKENS, SEQ_LEN, 33, 1, 0, 1, seed=0)
    with pytest.raises(ValueError, match="does not fit a corpus of 32 sequences"):
        TrainLoader(TOKENS, SEQ_LEN, 12, 1, 0, 1, seed=0).load_state_dict({"epoch": 0, "position": 32})


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 50])
@pytest.mark.parametrize("seq_len", [2, 8])
@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(1, 1), (3, 1), (2, 2), (4, 3)])
def test_evaluation_predicts_every_token_but_the_first_once(num_tokens, seq_len, micro_batch_size, world_size):
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint16)
    ranks = [
        list(evaluation_batches(tokens, seq_len, micro_batch_size, rank, world_size)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "collectives must match"
    predicted = []
    for batch in itertools.chain(*ranks):
        input_ids, labels = batch["input_ids"], batch["labels"]
        assert input_ids.shape == labels.shape == (micro_batch_size, seq_len) and labels.dtype == torch.int64
        counts = labels[:, 1:] != -100
        predicted += labels[:, 1:][counts].tolist()
        assert torch.equal(input_ids[:, :-1][counts] + 1, labels[:, 1:][counts]), "predicted from the token before"
        assert not input_ids[labels == -100].any()
    assert sorted(predicted) == list(range(2, num_tokens + 1))


def test_a_part_of_the_tokens_is_spread_over_all():
    tokens = np.arange(1000, dtype=np.uint16)  # 100 windows that predict 10 tokens each, the last one 9
    found = [
        batch["input_ids"][row, 0].item()
        for rank in range(2)
        for batch in evaluation_batches(tokens, 11, 4, rank, 2, max_tokens=250)
        for row in range(4)
        if (batch["labels"][row] != -100).any()
    ]
    assert sorted(found) == list(range(0, 1000, 40))


def test_evaluation_needs_two_tokens():
    with pytest.raises(ValueError, match="leave nothing to predict"):
        next(evaluation_batches(TOKENS[:1], 8, 1, 0, 1))

"""Packed windows with document masks: loss and gradients are those of the documents alone, however rows are dealt."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relora_ds.data import TrainLoader, evaluation_batches
from relora_ds.data.rows import MaskedRows, Masking, PackedRows
from relora_ds.models import recompute
from relora_ds.training.inputs import inputs_of
from relora_ds.training.validation import evaluate
from tests.ranks import ranks
from tests.small_models import cola, crnet, gpt2, gpt_neox, llama, mixtral

EOS, SEQ_LEN, ROWS = 2, 16, 6
CPU = torch.device("cpu")
# One ends with the first window, one is longer than three of them, some are nothing but EOS.
LENGTHS = [7, 9, 55, 1, 1, 4, 12, 1, 20, 3, 2, 31, 6, 5, 9, 1, 26, 14, 3, 8, 17, 2, 11]
GENERATOR = np.random.default_rng(0)
TOKENS = np.concatenate([[*GENERATOR.integers(5, 67, length - 1), EOS] for length in LENGTHS]).astype(np.uint16)


def loader_of(micro_batch_size=ROWS, rank=0, world_size=1, tokens=TOKENS, islands=(0, 1)):
    return TrainLoader(tokens, SEQ_LEN, ROWS, micro_batch_size, rank, world_size, 0, Masking(EOS), *islands)


def documents_in(windows) -> list[list[int]]:
    """The parts of documents in windows, each alone, of two tokens or more."""
    found = []
    for window in windows:
        part = []
        for token in window:
            part.append(int(token))
            if token == EOS:
                found, part = [*found, part], []
        found.append(part)
    return [part for part in found if len(part) > 1]


def windows_of(batches) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def alone(model, parts) -> tuple[torch.Tensor, int]:
    """The sum of the losses of parts of documents that a model sees one by one, and how many tokens are predicted."""
    ids = [torch.tensor([part]) for part in parts]
    count = sum(part.shape[1] - 1 for part in ids)
    return sum(model(input_ids=part, labels=part).loss * (part.shape[1] - 1) for part in ids), count


def gradients_of(model) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def step(model, micro_batches) -> tuple[float, torch.Tensor]:
    """Loss and gradients of a step on one rank, summed as DeepSpeed does."""
    total = 0.0
    for micro_batch in micro_batches:
        loss = model(**inputs_of(micro_batch, model, CPU)).loss / len(micro_batches)
        loss.backward()
        total += loss.item()
    return total, gradients_of(model)


def assert_same(found, expected, tolerance=1e-5) -> None:
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert (gradients - expected_gradients).norm() <= tolerance * expected_gradients.norm()


def reference(model, micro_batches) -> tuple[float, torch.Tensor]:
    nats, count = alone(model, documents_in(windows_of(micro_batches)))
    (nats / count).backward()
    return (nats / count).item(), gradients_of(model)


def test_positions_begin_again_and_first_tokens_are_not_predicted():
    rows = MaskedRows(PackedRows(TOKENS, SEQ_LEN), EOS)
    batch = rows.batch(np.array([0, 4]))
    assert batch["position_ids"].tolist() == [[*range(7), *range(9)], [*range(7), 0, 0, *range(4), *range(3)]]
    assert [row.index(0) for row in batch["position_ids"].tolist()] == [0, 0], "a window's beginning, whatever it is of"
    first = batch["position_ids"] == 0
    assert torch.equal(batch["labels"] == -100, first)
    assert torch.equal(batch["labels"][~first], batch["input_ids"][~first])
    assert rows.num_predicted(np.array([0, 4])) == 2 * SEQ_LEN - 2 - 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [llama, gpt2, gpt_neox, mixtral, cola, crnet])
def test_a_step_is_that_of_the_documents_alone(family, attention):
    model = family()
    expected = reference(model, loader_of().next_step())
    model.set_attn_implementation(attention)
    for micro_batch_size in (1, 3, ROWS):
        assert_same(step(model, loader_of(micro_batch_size).next_step()), expected)
    _, gradients = step(model, TrainLoader(TOKENS, SEQ_LEN, ROWS, ROWS, 0, 1, 0).next_step())
    assert (gradients - expected[1]).norm() > 0.1 * expected[1].norm(), "else there is nothing to keep apart"


@pytest.mark.parametrize(
    ("family", "mode"),
    [*itertools.product([llama, cola, crnet], ["full", "selective", "low_rank"]), (crnet, "inverted")],
)
def test_what_is_computed_again_has_the_same_positions(family, mode):
    model, micro_batches = family().train(), loader_of(3).next_step()
    model.set_attn_implementation("sdpa")
    expected = step(model, micro_batches)
    assert_same(step(recompute.apply(model, mode), micro_batches), expected, 1e-6)


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(1, 1), (2, 3), (3, 2), (1, 2)])
def test_the_mean_is_over_the_predicted_tokens_of_all_ranks(micro_batch_size, world_size):
    batches = [
        batch for rank in range(world_size) for batch in loader_of(micro_batch_size, rank, world_size).next_step()
    ]
    predicted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    found = {batch["num_items_in_batch"].item() for batch in batches}
    assert found == {np.float32(predicted / len(batches))}, "the same for every micro-batch"


def losses_of(micro_batch_size: int):
    """On a rank: loss and gradients of a step, and the validation loss."""
    import torch.distributed as dist

    model, world_size = llama(), dist.get_world_size()
    loss, gradients = step(model, loader_of(micro_batch_size, dist.get_rank(), world_size).next_step())
    total = torch.tensor([loss], dtype=torch.float64)
    for tensor in (total, gradients):
        dist.all_reduce(tensor)
        tensor /= world_size
    return total.item(), gradients, validation(model, micro_batch_size)


def validation(model, micro_batch_size: int, max_tokens: int | None = None):
    data = SimpleNamespace(
        validation=TOKENS,
        layout=Masking(EOS),
        padding=None,
        validation_words=9,
        validation_bytes=50,
        validation_parts=lambda: [(None, TOKENS)],
        sets=(),
    )
    return evaluate(model, data, seq_len=SEQ_LEN, micro_batch_size=micro_batch_size, device=CPU, max_tokens=max_tokens)


def test_nothing_depends_on_ranks_or_micro_batches():
    model = llama()
    expected, evaluated = reference(model, loader_of().next_step()), validation(model, 2)
    for micro_batch_size in (1, 3):
        loss, gradients, found = ranks(2).run(losses_of, micro_batch_size)[0]
        assert_same((loss, gradients), expected)
        assert found.val_tokens == evaluated.val_tokens and found.val_loss == pytest.approx(
            evaluated.val_loss, rel=1e-6
        )


def test_every_token_but_the_first_of_a_document_is_evaluated_once():
    model = llama()
    found = validation(model, 3)
    assert found.val_tokens == len(TOKENS) - len(LENGTHS) and found.galore_loss is None
    stride = SEQ_LEN - 1
    windows = [TOKENS[start : start + SEQ_LEN] for start in range(0, len(TOKENS) - 1, stride)]
    with torch.no_grad():
        nats, count = alone(model, documents_in(windows))
    assert count == found.val_tokens and found.val_loss == pytest.approx((nats / count).item(), rel=1e-6)
    assert found.bits_per_byte == pytest.approx((nats / count).item() * len(TOKENS) / np.log(2) / 50, rel=1e-6)
    assert validation(model, 3, max_tokens=100).val_tokens < 110


def test_the_state_and_the_order_are_those_without_masks():
    masked, plain = loader_of(2), TrainLoader(TOKENS, SEQ_LEN, ROWS, 2, 0, 1, 0)
    for _ in range(3):
        assert windows_of(masked.next_step()) == windows_of(plain.next_step())
        assert masked.state_dict() == plain.state_dict()


def test_each_island_takes_the_mean_over_its_own_tokens():
    tokens = np.concatenate([TOKENS, TOKENS])
    for island in range(2):
        micro_batches = loader_of(2, tokens=tokens, islands=(island, 2)).next_step()
        predicted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
        assert sum(batch["num_items_in_batch"].item() for batch in micro_batches) == pytest.approx(predicted)


def test_a_batch_in_which_nothing_is_predicted_has_loss_0():
    model = llama()
    nothing = np.full(ROWS * SEQ_LEN, EOS, dtype=np.uint16)
    loss, gradients = step(model, loader_of(3, tokens=nothing).next_step())
    assert loss == 0 and not gradients.any()
    with pytest.raises(ValueError, match="leave nothing to predict"):
        next(evaluation_batches(nothing, SEQ_LEN, 1, 0, 1, Masking(EOS)))

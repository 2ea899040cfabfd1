"""The order of rows: epochs of one corpus, exact proportions of several, and states that continue both."""

import numpy as np
import pytest

from relora_ds.data.order import MixedOrder, ShuffledOrder

WEIGHTS = [[0.5, 0.5], [0.7, 0.2, 0.1], [0.333333, 0.333333, 0.333334], [0.6, 0.25, 0.1, 0.04, 0.01], [1.0]]


def random_weights(seed: int) -> list[float]:
    drawn = np.random.default_rng(seed).random(2 + seed % 6)
    return list(drawn / drawn.sum())


def corpus_of(rows: np.ndarray, num_rows: list[int]) -> np.ndarray:
    return np.searchsorted(np.cumsum(num_rows), rows, side="right")


@pytest.mark.parametrize("weights", [*WEIGHTS, *map(random_weights, range(8))], ids=lambda w: f"{len(w)}")
def test_a_mixture_is_never_a_whole_row_away_from_its_proportions(weights):
    num_rows = [7 + 30 * index for index in range(len(weights))]
    order = MixedOrder(num_rows, weights, seed=0)
    of = corpus_of(np.concatenate([order.take(16) for _ in range(250)]), num_rows)
    counts = np.cumsum(of[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, len(of) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - exact).max() < 1
    assert order.taken == len(of) and order.taken_of_each == counts[-1].tolist()


def test_each_corpus_of_a_mixture_is_read_in_epochs_of_its_own():
    num_rows = [6, 40]
    order = MixedOrder(num_rows, [0.5, 0.5], seed=3)
    rows = order.take(96)
    first, second = rows[rows < 6], rows[rows >= 6] - 6
    assert all(sorted(first[start : start + 6]) == list(range(6)) for start in range(0, 48, 6))
    assert len({tuple(first[start : start + 6]) for start in range(0, 48, 6)}) > 4
    assert sorted(second[:40]) == list(range(40)) and len(set(second[40:])) == 8


def test_corpora_of_one_size_have_permutations_of_their_own():
    order = MixedOrder([50, 50], [0.5, 0.5], seed=0)
    rows = order.take(100)
    assert list(rows[rows < 50]) != list(rows[rows >= 50] - 50)


@pytest.mark.parametrize("size", [1, 5, 96])
def test_the_rows_do_not_depend_on_how_many_are_taken_at_a_time(size):
    whole, pieces = (MixedOrder([6, 40, 9], [0.5, 0.3, 0.2], seed=1) for _ in range(2))
    expected = whole.take(192)
    taken = np.concatenate([pieces.take(min(size, 192 - start)) for start in range(0, 192, size)])
    assert (taken == expected).all()


def make(kind: str, seed: int = 1):
    return ShuffledOrder(13, seed) if kind == "one" else MixedOrder([6, 40, 9], [0.5, 0.3, 0.2], seed)


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("done", [0, 1, 17, 64])
def test_a_state_continues_where_it_was_made(kind, done):
    order, resumed, skipped = make(kind), make(kind), make(kind)
    order.take(done)
    resumed.load_state_dict(order.state_dict())
    skipped.skip(done)
    assert resumed.taken == order.taken == skipped.taken == done
    rows = order.take(40)
    assert (resumed.take(40) == rows).all() and (skipped.take(40) == rows).all()
    assert (make(kind, seed=2).take(40) != make(kind).take(40)).any()


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("one", {"epoch": 0, "position": 13}),
        ("one", {"epoch": -1, "position": 0}),
        ("one", {"taken": [1, 2, 3]}),
        ("several", {"epoch": 0, "position": 1}),
        ("several", {"taken": [1, 2]}),
        ("several", {"taken": [1, -2, 3]}),
    ],
)
def test_a_state_of_other_corpora_is_refused(kind, state):
    with pytest.raises(ValueError, match="does not fit a (corpus of 13 sequences|mixture of 3 corpora)"):
        make(kind).load_state_dict(state)

"""Batches that are made a step ahead: the same ones, and the same place to resume from."""

import threading

import pytest
import torch

from relora_ds.data import Prefetched, TrainLoader
from tests.data.test_loader import SEQ_LEN, TOKENS


class Watched(TrainLoader):
    """Attributes: threads: the names of those that asked for a step; fails_at: the step that cannot be made."""

    def __init__(self, *, micro_batch_size=2, rank=0, world_size=1, fails_at=None):
        super().__init__(TOKENS, SEQ_LEN, 12, micro_batch_size, rank, world_size, seed=3)
        self.threads, self.fails_at = [], fails_at

    def next_step(self):
        self.threads.append(threading.current_thread().name)
        if len(self.threads) == self.fails_at:
            raise OSError("the disk is gone")
        return super().next_step()


def making() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "next batch"]


def same(one, other) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.mark.parametrize("ahead", [True, False])
def test_batches_and_states_are_those_of_the_loader(ahead):
    plain, loader = Watched(), Prefetched(Watched(), ahead=ahead, pin=False)
    assert loader.state_dict() == plain.state_dict()
    for _ in range(7):  # more than two epochs
        assert same(loader.next_step(), plain.next_step())
        assert loader.state_dict() == plain.state_dict()


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(2, 1), (3, 2)])
def test_a_run_goes_on_from_the_step_that_was_trained(micro_batch_size, world_size):
    loader = Prefetched(Watched(), ahead=True, pin=False)
    for _ in range(3):
        loader.next_step()
    state = loader.state_dict()
    whole = torch.cat([batch["input_ids"] for batch in loader.next_step()])
    parts = []
    for rank in range(world_size):
        resumed = Watched(micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
        resumed.load_state_dict(state)
        parts.append(Prefetched(resumed, ahead=True, pin=False).next_step())
    together = torch.cat([batch["input_ids"] for ranks in zip(*parts, strict=True) for batch in ranks])
    assert torch.equal(together, whole)


def test_one_step_is_made_ahead_by_a_thread_that_ends_with_it():
    watched = Watched()
    loader = Prefetched(watched, ahead=True, pin=False)
    loader.next_step()
    for thread in making():
        thread.join(10)
    assert not making()
    assert [name == "next batch" for name in watched.threads] == [False, True]


def test_nothing_is_made_ahead_of_the_last_step_and_one_that_follows_all_the_same_is_right():
    plain, watched = Watched(), Watched()
    loader = Prefetched(watched, ahead=True, pin=False)
    assert same(loader.next_step(is_last=True), plain.next_step())
    assert len(watched.threads) == 1 and not making()
    assert same(loader.next_step(), plain.next_step())  # the last step was not applied


def test_a_cpu_makes_them_when_they_are_asked_for():
    watched = Watched()
    loader = Prefetched(watched, ahead=False, pin=False)
    loader.next_step()
    assert watched.threads == [threading.current_thread().name]


def test_what_fails_in_the_thread_is_raised_where_the_batch_is_asked_for():
    loader = Prefetched(Watched(fails_at=3), ahead=True, pin=False)
    loader.next_step()
    loader.next_step()
    state = loader.state_dict()
    with pytest.raises(OSError, match="the disk is gone"):
        loader.next_step()
    assert loader.state_dict() == state == {"epoch": 0, "position": 24}


def test_batches_for_a_gpu_are_pinned_by_the_thread(monkeypatch):
    by = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: by.append(threading.current_thread().name) or self)
    loader = Prefetched(Watched(), ahead=True, pin=True)
    loader.next_step()
    loader.next_step(is_last=True)
    assert by.count("next batch") == len(by) // 2 == 2 * 6  # ids and labels of six micro-batches

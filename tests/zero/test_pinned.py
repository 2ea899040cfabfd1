"""The store of the masters: one block of memory, and values that are being saved stay as they are."""

import contextlib
import gc
import types
import weakref

import pytest
import torch

from relora_ds.zero import pinned
from relora_ds.zero.pinned import MasterStore, host_block

CPU = torch.device("cpu")
SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([5]), "c": torch.Size([1, 7])}
NUMEL = 6 + 5 + 7


def value(number: float, name: str) -> torch.Tensor:
    return torch.full(SHAPES[name], number)


def filled(number: float = 1.0) -> MasterStore:
    store = MasterStore(SHAPES, CPU)
    for name in SHAPES:
        store.put(name, value(number, name))
    return store


def storages(tensors) -> dict[int, int]:
    """Bytes by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_all_tensors_lie_in_one_block_of_four_bytes_a_weight():
    store = filled()
    assert list(storages(store.values()).values()) == [4 * NUMEL]
    before = storages(store.values())
    for name in SHAPES:
        store.put(name, value(2.0, name))
    assert storages(store.values()) == before, "nobody held the old values: no other block"
    assert all(torch.equal(store[name], value(2.0, name)) for name in SHAPES)


def test_what_is_read_and_put_are_copies():
    store, new = filled(), value(3.0, "a")
    store.put("a", new)
    new.zero_()
    store.read("a", CPU).zero_()
    assert torch.equal(store["a"], value(3.0, "a"))


def test_held_values_stay_as_they_are_and_the_second_block_becomes_the_only_one():
    store = filled()
    held = store.hold()
    for number in (2.0, 3.0):  # two restarts while one checkpoint is written
        for name in SHAPES:
            store.put(name, value(number, name))
    assert all(torch.equal(held[name], value(1.0, name)) for name in SHAPES)
    assert all(torch.equal(store[name], value(3.0, name)) for name in SHAPES)
    blocks = storages([*held.values(), *store.values()])
    assert list(blocks.values()) == [4 * NUMEL] * 2, "one block for what is held, one for all newer values"
    old = weakref.ref(next(iter(held.values())))
    del held
    assert old() is None
    before = storages(store.values())
    store.put("a", value(4.0, "a"))
    assert storages(store.values()) == before, "no longer held"


def test_every_generation_that_is_held_stays():
    store, held = filled(0.0), []
    for number in range(1, 6):
        held.append(store.hold())
        for name in list(SHAPES)[number % 2 :]:  # not always all of them
            store.put(name, value(number, name))
    for number, values in enumerate(held):
        for name in SHAPES:
            last = max((n for n in range(1, number + 1) if name in list(SHAPES)[n % 2 :]), default=0)
            assert torch.equal(values[name], value(last, name)), (number, name)


def test_the_first_block_is_gone_with_the_last_who_held_it(monkeypatch):
    gone = []
    monkeypatch.setattr(pinned._Memory, "__del__", lambda memory: gone.append(len(memory)), raising=False)
    store = filled()
    held = store.hold()
    for name in SHAPES:
        store.put(name, value(2.0, name))
    assert not gone
    held.popitem()
    assert not gone
    del held
    assert gone == [4 * NUMEL]
    del store
    assert gone == [4 * NUMEL] * 2


@pytest.fixture
def cuda(monkeypatch):
    """What the library asks of CUDA, written down: registered addresses and the order of events."""
    seen = types.SimpleNamespace(locked={}, events=[])
    monkeypatch.setattr(pinned, "pin_memory", seen.locked.__setitem__)
    monkeypatch.setattr(pinned, "unpin_memory", seen.locked.pop)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext(seen.events.append(index)))
    return seen


def test_a_block_is_locked_whole_and_unlocked_with_its_last_tensor(cuda):
    block = host_block(1000, pinned=True)
    assert cuda.locked == {block.data_ptr(): 4000} and block.data_ptr() % 4096 == 0
    piece = block[10:20]
    del block
    gc.collect()
    assert cuda.locked
    del piece
    gc.collect()
    assert not cuda.locked and cuda.events == [3], "on the device that had locked it"


def test_memory_that_cannot_be_locked_is_an_error_with_a_remedy(monkeypatch):
    refusing = types.SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(RuntimeError, match=r"4,000 bytes .* \(cudaError 2\); .* frozen_master=device"):
        host_block(1000, pinned=True)


def test_a_store_locks_nothing_again_at_a_restart(cuda):
    store = MasterStore(SHAPES, CPU, pinned=True)
    before = dict(cuda.locked)
    for name in SHAPES:
        store.put(name, value(1.0, name))
    assert cuda.locked == before and list(before.values()) == [4 * NUMEL]


def test_nothing_to_keep_needs_no_memory():
    store = MasterStore({}, CPU, pinned=True)
    assert len(store) == 0 and store.hold() == {} and not host_block(0, pinned=True).numel()

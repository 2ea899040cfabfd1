"""What a checkpoint is written from: copies of flat partitions, in one block that is used again."""

import pytest
import torch
from safetensors.torch import save
from torch.utils._python_dispatch import TorchDispatchMode

from relora_ds.checkpoint.contents import PARTS
from relora_ds.zero.capture import capture
from relora_ds.zero.pinned import HostCopies
from tests.parity import cases
from tests.ranks import ranks


class Copies(TorchDispatchMode):
    """Counts what is copied into a tensor."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def capture_twice(stage, precision, offload) -> tuple[int, int]:
    """Into the same block; returns how many copies each took, and how many tensors there are."""
    engine = cases.build(stage, precision=precision, offload=offload, hidden_size=36)
    copies, used = HostCopies(pinned=False), set()
    for step in range(2):
        cases.train_step(engine, step)
        with Copies() as counted:
            captured = capture(engine, [0, 1], False, copies)
        expected = {
            f"{part}/{name}": engine.shards[name].read(part).clone() for name in captured.ranges for part in PARTS
        }
        expected |= {name: value for name, value in captured.trained.items() if name.startswith("buffer/")}
        assert save(captured.trained) == save(expected), "the file would have other bytes"
        used |= {t.untyped_storage().data_ptr() for name, t in captured.trained.items() if "buffer/" not in name}
    assert len(used) == 1, "another block"
    cases.release(engine)
    assert save(captured.trained) == save(expected), "a release changes it"
    return counted.number, len(PARTS) * len(captured.ranges)


@pytest.mark.slow  # every test of a checkpoint reads what was copied so; only here are the copies counted
@pytest.mark.parametrize("stage, precision, offload", [(1, "bf16", False), (2, "fp32", True), (3, "bf16", False)])
def test_flat_partitions_are_copied_whole(stage, precision, offload):
    for copied, tensors in ranks(2).run(capture_twice, stage, precision, offload):
        assert tensors > 60
        assert copied <= len(PARTS) * 3 + 3, "one for each part of each parameter group, and buffers"


def test_where_nothing_is_flat_every_tensor_is_copied_once():
    for copied, tensors in ranks(2).run(capture_twice, 0, "fp32", False):
        assert copied <= tensors + 3


def test_copies_follow_the_order_of_what_is_asked_for_and_leave_gaps_out():
    flat, other = torch.arange(5000.0), torch.arange(3.0)
    pieces = {"late": flat[4000:4500], "b": flat[12:20], "other": other, "a": flat[:10]}
    copies = HostCopies(pinned=False)
    with Copies() as counted:
        taken = copies.take(pieces)
    assert list(taken) == list(pieces) and counted.number == 3
    assert all(torch.equal(taken[name], piece) for name, piece in pieces.items())
    assert taken["a"].untyped_storage().nbytes() == 4 * (20 + 500 + 3)
    flat.zero_()
    assert taken["b"][0] == 12
    assert copies.take({}) == {}

"""What owners' steps take for a while, against the tensors of real engines on two ranks."""

from unittest import mock

import pytest

from relora_ds.planning import device_memory
from relora_ds.planning.device_memory import DEVICE, HOST, UPDATE
from relora_ds.planning.host import CHECKPOINT
from relora_ds.zero import verify_ranks
from relora_ds.zero.capture import capture
from relora_ds.zero.teardown import release
from tests.peak_bytes import PeakBytes
from tests.planning.engines import build, micro_step, overrides, planned
from tests.ranks import ranks
from tests.zero.live_tensors import live_bytes


def peaks_of_steps(changes: list[str]) -> list[int]:
    """On a rank: the most bytes that each step of factors had at once beside what is kept."""
    engine, peaks = build(changes), []
    for step in range(4):
        micro_step(engine, step)
        with mock.patch.object(verify_ranks, "_CHUNK", 1 << 12), PeakBytes() as memory:
            engine.owner_steps.gather(1.0)
            engine.owner_steps.apply(step + 1, 1.0, 1.0)
        peaks.append(memory.peak)
    release(engine)
    return peaks


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        pytest.param(0, [], marks=pytest.mark.slow),
        pytest.param(1, ["relora.frozen_dtype=int8"], marks=pytest.mark.slow),
        (3, []),
    ],
)
def test_what_a_step_of_factors_has_at_once(stage, more):
    """Every rank forms every weight, whatever it stores of it; the first step and the fourth decompose."""
    sizes = ["relora.r=128", "sst.iteration_steps=2"]
    changes = overrides(stage, "bf16", "sst", 1, *sizes, *more)
    expected = device_memory.total(planned(changes).items, DEVICE, UPDATE)
    for peaks in ranks(2).run(peaks_of_steps, changes):
        assert 0.85 * expected < max(peaks) <= expected, [peak / expected for peak in peaks]


def held_for_a_checkpoint(changes: list[str]) -> int:
    """On a rank: how much more is alive after a step, while a checkpoint of the state before it is written."""
    engine = build(changes)
    micro_step(engine, 0)
    engine.step()
    before = live_bytes()
    captured = capture(engine, [0, 1], with_frozen=True)
    micro_step(engine, 1)
    engine.step()
    found = live_bytes() - before
    assert captured.frozen
    del captured
    release(engine)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sst", "muon"])
def test_what_a_checkpoint_holds_on_the_host_while_owners_step(method):
    changes = overrides(1, "bf16", method, 1, *["relora.r=128"] * (method == "sst"))
    expected = device_memory.total(planned(changes).items, HOST, CHECKPOINT)
    for found in ranks(2).run(held_for_a_checkpoint, changes):
        assert found == pytest.approx(expected, rel=0.05)

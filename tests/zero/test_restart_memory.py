"""A restart goes layer by layer: what it needs at once is a few copies of one, however many there are."""

from unittest import mock

import pytest
import torch

from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.zero import merging, verify_ranks
from tests.parity import cases
from tests.peak_bytes import PeakBytes
from tests.ranks import ranks
from tests.zero.restarts import fingerprint

SIZES = {"hidden_size": 256, "intermediate_size": 512}
LARGEST = 4 * 256 * 512  # bytes in fp32


def peak(stage, precision, num_layers, **relora) -> tuple[int, int, int]:
    """Bytes that a restart had alive at once, what `peak_bytes` says, and those that it left behind.

    The smallest of some: gloo's threads let go of a tensor a little after its collective has ended.
    """
    relora = cases.relora_config(**relora)
    engine = cases.build(stage, precision=precision, relora=relora, num_hidden_layers=num_layers, **SIZES)
    shapes = {name: layer.weight_shape for name, layer in lowrank_layers(engine.module).items()}
    expected = merging.peak_bytes(shapes, relora.r, stage=stage, world_size=torch.distributed.get_world_size())
    found = []
    for step in range(3):
        cases.train_step(engine, step)
        with mock.patch.object(verify_ranks, "_CHUNK", LARGEST // 64), PeakBytes() as memory:
            engine.restart()
        found.append((memory.peak, expected, memory.live))
    cases.release(engine)
    return min(found)


@pytest.mark.parametrize(
    "world_size, stage, precision, relora",
    [
        pytest.param(1, 1, "bf16", {}, marks=pytest.mark.slow),
        pytest.param(1, 1, "fp32", {}, marks=pytest.mark.slow),
        (1, 0, "bf16", {"frozen_master": "none"}),
        pytest.param(2, 0, "bf16", {}, marks=pytest.mark.slow),
        pytest.param(2, 1, "fp32", {"frozen_dtype": "fp8"}, marks=pytest.mark.slow),
        pytest.param(2, 2, "bf16", {"frozen_dtype": "nf4"}, marks=pytest.mark.slow),
        (2, 3, "bf16", {"frozen_dtype": "int8"}),
    ],
)
def test_the_peak_is_that_of_one_layer(world_size, stage, precision, relora):
    few, many = (ranks(world_size).run(peak, stage, precision, num_layers, **relora) for num_layers in (1, 3))
    for found, expected, left in few + many:
        assert found <= 1.1 * expected, (found / LARGEST, expected / LARGEST)
        assert left < 4096, "of the restart's own tensors"
    for (found, *_), (later, *_) in zip(few, many, strict=True):
        # Some samples for the ledger and, from other ranks, the factors; two more layers have 2 MB of weights in bf16.
        assert later - found < LARGEST


def a_rank_without_memory(stage) -> tuple[str, bool]:
    """What rank 1's failure becomes on this rank, and whether anything was changed."""
    engine = cases.build(stage, precision="bf16")
    cases.train_step(engine, 0)
    cases.train_step(engine, 1)
    before = fingerprint(cases.gathered_state(engine), cases.stored_weights(engine), engine.frozen.masters)
    merged, message = merging._merged, ""

    def fails(*args):
        if torch.distributed.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return merged(*args)

    with mock.patch.object(merging, "_merged", fails):
        try:
            engine.restart()
        except RuntimeError as error:
            message = str(error)
    after = fingerprint(cases.gathered_state(engine), cases.stored_weights(engine), engine.frozen.masters)
    cases.release(engine)
    return message, before == after


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_without_memory_for_a_merge_ends_all_before_anything_is_changed(stage):
    for message, unchanged in ranks(2).run(a_rank_without_memory, stage):
        assert message.startswith("restart: rank 1 could not merge model.layers.")
        assert message.endswith("nothing was changed") and unchanged

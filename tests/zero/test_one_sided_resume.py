"""A one-sided chain resumes to the bit: with its basis, and the moments that stay over a restart."""

import pytest

from tests.parity import cases
from tests.ranks import ranks
from tests.zero.restarts import BLOCKS
from tests.zero.test_checkpoint import build, train
from tests.zero.test_formats import FORMATS, PLACES
from tests.zero.test_nonfinite import everything

AT_A_REFRESH, WITHIN_A_CYCLE, END = 4, 6, 9  # restarts at 4 and 8
ONE_SIDED = dict(trains="B", restart_init="gradient", optimizer_reset="rotate")


def whole(stage, precision, directory: str, saved_at: int, **frozen) -> dict:
    engine = build(stage, precision, frozen=frozen, **BLOCKS)
    losses = train(engine, 0, saved_at)
    engine.save_checkpoint(directory)
    result = {"saved": everything(engine), "losses": losses + train(engine, saved_at, END), "end": everything(engine)}
    assert engine.restarts == [4, 8]
    cases.release(engine)
    return result


def resumed(stage, precision, directory: str, saved_at: int, **frozen) -> dict:
    engine = build(stage, precision, frozen=frozen, model_seed=1, **BLOCKS)
    engine.load_checkpoint(directory)
    result = {"saved": everything(engine), "losses": train(engine, saved_at, END), "end": everything(engine)}
    cases.release(engine)
    return result


def check(stage, precision, directory, saved_at, **frozen) -> None:
    how = (stage, precision, str(directory), saved_at)
    expected = ranks(2).run(whole, *how, **{**ONE_SIDED, **frozen})
    for rank, found in enumerate(ranks(2).run(resumed, *how, **{**ONE_SIDED, **frozen})):
        assert found["saved"] == expected[rank]["saved"]
        assert found["losses"] == expected[rank]["losses"][saved_at:]
        assert found["end"] == expected[rank]["end"]


@pytest.mark.parametrize(
    ("stage", "precision", "frozen"),
    [(0, "fp32", {}), (3, "bf16", {"gradient_estimate": "warm_sketch", "optimizer_reset": "none"})],
)
def test_at_a_refresh(stage, precision, frozen, tmp_path):
    check(stage, precision, tmp_path, AT_A_REFRESH, **frozen)


@pytest.mark.slow
@pytest.mark.parametrize("saved_at", [AT_A_REFRESH, WITHIN_A_CYCLE])
@pytest.mark.parametrize("estimate", ["sketch", "warm_sketch", "exact"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_and_estimate(stage, precision, estimate, saved_at, tmp_path):
    check(stage, precision, tmp_path, saved_at, gradient_estimate=estimate)


@pytest.mark.slow
@pytest.mark.parametrize("frozen_master", ["cpu", "none"])
@pytest.mark.parametrize("frozen_dtype", FORMATS)
@pytest.mark.parametrize("stage, placement", PLACES)
def test_every_format(stage, placement, frozen_dtype, frozen_master, tmp_path):
    frozen = dict(frozen_dtype=frozen_dtype, frozen_placement=placement, frozen_master=frozen_master)
    check(stage, "fp32", tmp_path, WITHIN_A_CYCLE, **frozen)

"""Frozen weights in 8 and 4 bits over many restarts, and across a save and a load."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from relora_ds.lowrank.wrap import lowrank_layers
from tests.checkpoint.weights import weights_in
from tests.parity import cases
from tests.ranks import ranks
from tests.zero import test_checkpoint
from tests.zero.restarts import BLOCKS, frozen_masters

FORMATS = ["int8", "fp8", "nf4"]
PLACES = [(0, "auto"), (1, "auto"), (2, "auto"), (3, "sharded"), (3, "replicated")]
NUM_RESTARTS = 22


def many_restarts(frozen_dtype: str, frozen_master: str) -> dict:
    """Restart every second step. Beside it W + Σ s·B·A in fp64; returns what was lost against it, by restart."""
    relora = cases.relora_config(
        restart_every=2,
        restart_warmup_steps=1,
        frozen_dtype=frozen_dtype,
        frozen_master=frozen_master,
        optimizer_reset="none",
    )
    engine = cases.build(1, relora=relora, weight_decay=0.0, **BLOCKS)
    layers = lowrank_layers(engine.module)
    exact = {name: value.double() for name, value in frozen_masters(engine).items()}
    restarts, after_step = [], engine.after_step

    def watched(engine):
        if not engine.lr_scheduler.restart_due:
            return
        state = cases.gathered_state(engine)["master"]
        for name in layers:
            exact[name] += cases.SCALING * state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
        after_step(engine)
        stored = {name: engine.frozen.dequantize(name, value) for name, value in cases.stored_weights(engine).items()}
        restarts.append(
            {
                "master": max(_distance(value, exact[name]) for name, value in frozen_masters(engine).items()),
                "stored": sum(_distance(stored[name], exact[name]) for name in layers) / len(layers),
                "merge_loss": engine.last_restart.merge_loss,
                "total": engine.last_restart.merge_loss_total,
            }
        )

    engine.after_step = watched
    for step in range(2 * NUM_RESTARTS + 1):
        cases.train_step(engine, step)
    cases.release(engine)
    return {key: [restart[key] for restart in restarts] for key in restarts[0]}


def _distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_twenty_restarts_with_and_without_masters(frozen_dtype):
    kept, lost = (ranks(2).run(many_restarts, frozen_dtype, master)[0] for master in ("cpu", "none"))
    assert len(kept["stored"]) == NUM_RESTARTS
    # The master is what an unquantized fp32 run would have merged.
    assert max(kept["master"]) <= 1e-6
    # So the stored copy is one rounding away from it, after the last restart as after the first ...
    assert kept["stored"][-1] <= 1.1 * kept["stored"][0]
    # ... and of the whole update, ever less is missing.
    assert kept["total"][-1] < 0.5 * kept["total"][0]
    # Without one, roundings and lost updates pile up, and the metric says so.
    assert lost["stored"][-1] > 1.5 * kept["stored"][-1]
    assert lost["total"][-1] > 2 * kept["total"][-1]
    assert lost["total"][0] == pytest.approx(lost["merge_loss"][0])


@pytest.mark.each_value_once
@pytest.mark.parametrize("frozen_dtype", FORMATS)
@pytest.mark.parametrize(
    "stage, placement",
    [pytest.param(*place, marks=[pytest.mark.slow] * (place[0] in (0, 2))) for place in PLACES],
)
def test_resume_is_exact_through_the_next_restart(stage, placement, frozen_dtype, tmp_path):
    frozen = dict(frozen_dtype=frozen_dtype, frozen_placement=placement)
    test_checkpoint.check(stage, "fp32", str(tmp_path), frozen=frozen, **BLOCKS)


@pytest.mark.parametrize(
    "stage, placement",
    [
        pytest.param(1, "auto", marks=pytest.mark.slow),
        (3, "sharded"),
        pytest.param(3, "replicated", marks=pytest.mark.slow),
    ],
)
def test_resume_without_masters_is_exact(stage, placement, tmp_path):
    frozen = dict(frozen_dtype="nf4", frozen_placement=placement, frozen_master="none")
    test_checkpoint.check(stage, "fp32", str(tmp_path), frozen=frozen, **BLOCKS)


def converted(stage: int, directory: str, before: dict, after: dict) -> dict:
    """Save with one storage, load into another engine with another one; what was there and what is."""
    engine = test_checkpoint.build(stage, "fp32", frozen=before, **BLOCKS)
    test_checkpoint.train(engine, 0, 6)
    engine.save_checkpoint(directory, tag="t")
    was = {
        "masters": frozen_masters(engine),
        "loss": engine.last_restart.merge_loss_total,
        "merged": engine.collect_merged(),
    }
    cases.release(engine)
    dist.barrier()
    for name, value in weights_in(Path(directory, "t")).items():
        assert torch.equal(value, was["merged"][name]), name

    engine = test_checkpoint.build(stage, "fp32", frozen=after, model_seed=1, **BLOCKS)
    untouched = cases.stored_weights(engine)
    try:
        engine.load_checkpoint(directory, tag="t")
    except ValueError as error:
        assert all(torch.equal(value, untouched[name]) for name, value in cases.stored_weights(engine).items())
        return {"error": str(error)}
    else:
        masters, stored = frozen_masters(engine), cases.stored_weights(engine)
        for name, value in was["masters"].items():
            if engine.frozen.with_masters or engine.frozen.storage.exact:
                assert torch.equal(masters[name], value), name
            assert torch.equal(stored[name], engine.frozen.quantize(value)), name
        test_checkpoint.train(engine, 6, 10)
        if engine.frozen.storage.exact:  # what the other format lost is not lost any more
            assert engine.last_restart.merge_loss_total < 1e-4
        return {"restarts": list(engine.restarts)}
    finally:
        cases.release(engine)


CONVERSIONS = [
    pytest.param(1, dict(frozen_dtype="nf4"), dict(frozen_dtype="int8"), marks=pytest.mark.slow),
    pytest.param(2, dict(frozen_dtype="int8"), dict(frozen_dtype="fp32"), marks=pytest.mark.slow),
    pytest.param(0, dict(frozen_dtype="bf16"), dict(frozen_dtype="nf4", frozen_master="none"), marks=pytest.mark.slow),
    pytest.param(
        1, dict(frozen_dtype="auto"), dict(frozen_dtype="int8", frozen_master="device"), marks=pytest.mark.slow
    ),
    pytest.param(3, dict(frozen_dtype="nf4"), dict(frozen_dtype="fp8"), marks=pytest.mark.slow),
    pytest.param(
        3, dict(frozen_dtype="int8", frozen_placement="replicated"), dict(frozen_dtype="int8"), marks=pytest.mark.slow
    ),
    (3, dict(frozen_dtype="int8"), dict(frozen_dtype="nf4", frozen_placement="replicated")),
    pytest.param(
        3, dict(frozen_dtype="fp32", frozen_placement="replicated"), dict(frozen_dtype="nf4"), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("stage, before, after", CONVERSIONS)
def test_a_checkpoint_of_another_format_is_converted_from_its_masters(stage, before, after, tmp_path):
    for result in ranks(2).run(converted, stage, str(tmp_path), before, after):
        assert result == {"restarts": [4, 8]}


@pytest.mark.parametrize("stage", [1, 3])
def test_without_masters_a_checkpoint_of_another_format_is_refused(stage, tmp_path):
    before, after = dict(frozen_dtype="int8", frozen_master="none"), dict(frozen_dtype="nf4")
    for result in ranks(2).run(converted, stage, str(tmp_path), before, after):
        assert (
            "does not fit: frozen_dtype was int8, is nf4" in result["error"]
            and "without fp32 masters" in result["error"]
        )


def logged(**options) -> list[str]:
    """What `initialize` warns of."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("relora_ds")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        cases.release(cases.build(1, relora=cases.relora_config(**options), **BLOCKS))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return found


def test_a_users_own_loop_is_warned_of_what_is_lost_without_masters():
    first, second = ranks(2).run(logged, frozen_dtype="nf4", frozen_master="none")
    assert len(first) == 1 and first[0].startswith("frozen_master: none") and "98 %" in first[0]
    assert second == []  # rank 0 talks
    assert ranks(2).run(logged, frozen_dtype="nf4")[0] == []


def odd_shape() -> str:
    try:
        cases.build(1, relora=cases.relora_config(frozen_dtype="nf4"))
    except ValueError as error:
        return str(error)
    return ""


def test_a_block_that_does_not_divide_is_an_error():
    for message in ranks(2).run(odd_shape):
        assert "ReLoRAConfig.frozen_dtype: model.layers.0.self_attn.q_proj and " in message
        assert "nf4 stores blocks of 64 weights, which do not divide its 20x20" in message

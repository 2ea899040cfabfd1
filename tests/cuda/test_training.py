"""Steps and restarts on GPUs are those on a CPU in fp32, at every stage and precision."""

import functools
import importlib.util

import pytest

import relora_ds
from relora_ds.models import liger
from tests.cuda.gpus import WORLD_SIZES, needs, on_gpus, real_gpu
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import llama
from tests.zero import test_eight_bit as eight_bit
from tests.zero.test_nonfinite import everything, spoiled_step

STEPS, EVERY = 20, 3
SIZES = dict(hidden_size=32, intermediate_size=48)  # every format can store them
RESTARTS = [EVERY * i for i in range(1, 7)]
# How far losses are from those of a CPU in fp32, relative, at the most.
WORST = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}


def relora(**changes):
    return cases.relora_config(restart_every=EVERY, restart_warmup_steps=1, optimizer_reset="zero", **changes)


@functools.cache
def on_cpu(frozen_dtype: str = "auto") -> list[float]:
    (found,) = ranks(1).run(cases.train_case, STEPS, stage=1, relora=relora(frozen_dtype=frozen_dtype), **SIZES)
    return found["losses"]


def check(world_size: int, precision: str = "fp32", worst: float | None = None, frozen_dtype: str = "auto", **how):
    config = relora(frozen_dtype=frozen_dtype, **how.pop("relora", {}))
    for found in on_gpus(world_size, cases.train_case, STEPS, precision=precision, relora=config, **SIZES, **how):
        assert found["restarts"] == RESTARTS and min(found["norms"]) > 1e-3
        off = max(abs(a - b) / b for a, b in zip(found["losses"], on_cpu(frozen_dtype), strict=True))
        assert off < (worst or WORST[precision]), f"losses are off by {off:.1e}"
        assert found["losses"][-1] < found["losses"][0] - 0.05


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3, 0, 2])
def test_every_stage(stage, precision, world_size):
    check(world_size, precision, stage=stage)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("overlap", [True, False])
def test_stage_3_with_and_without_overlapping(overlap, world_size):
    """And without small parameters that stay gathered: all of them are gathered and given back in each step."""
    check(world_size, stage=3, zero={"overlap_comm": overlap, "stage3_param_persistence_threshold": 0})


@pytest.mark.parametrize("frozen_dtype", ["int8", "fp8", pytest.param("nf4", marks=needs("bitsandbytes"))])
@pytest.mark.parametrize("stage", [1, 3])
def test_formats(stage, frozen_dtype):
    check(1, "bf16", frozen_dtype=frozen_dtype, worst=5e-2, stage=stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_optimizer_on_the_host(stage):
    check(1, stage=stage, offload=True)


@needs("bitsandbytes")
@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (3, False), (3, True)])
def test_moments_in_8_bit(stage, offload, tmp_path):
    check(1, "bf16", stage=stage, offload=offload, optimizer="adamw_8bit")
    (found,) = on_gpus(1, eight_bit.run, stage, "bf16", str(tmp_path), offload=offload)
    held, expected = found["bytes"]
    assert held == expected
    assert found["pruned"]


def test_parameters_on_the_host():
    check(1, stage=3, zero={"offload_param": {"device": "cpu"}})


def overflow(stage: int) -> dict:
    """Steps in fp16, one that overflows, and steps after it."""
    engine = cases.build(stage, precision="fp16", relora=relora())
    for step in range(6):  # the scale may be found too large
        cases.train_step(engine, step)
    before, t, scale = everything(engine), engine.t, engine.optimizer.cur_scale
    spoiled_step(engine, float("inf"))
    spoiled_step(engine, float("inf"))  # DeepSpeed lets one pass before it lowers the scale
    after = everything(engine)
    found = {
        "changed": [what for what in before if before[what] != after[what]],
        "counted": engine.t - t,
        "scale": engine.optimizer.cur_scale / scale,
    }
    losses = [cases.train_step(engine, step) for step in range(6, STEPS)]
    found |= {"t": engine.t - t, "losses": losses, "restarts": len(engine.restarts)}
    cases.release(engine)
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_an_overflow_in_fp16_costs_its_batch_only(stage):
    (found,) = on_gpus(1, overflow, stage)
    assert found["changed"] == [] and found["counted"] == 0 and found["scale"] < 1
    assert found["t"] > 10 and found["restarts"] >= 3
    assert found["losses"][-1] < found["losses"][0]


def losses_with_liger(stage: int, precision: str, with_liger: bool) -> list[float]:
    config = relora()
    model = relora_ds.wrap(llama(hidden_size=64, intermediate_size=128), config, seed=0)
    if with_liger:
        liger.apply(model)
    engine, *_ = relora_ds.initialize(
        model,
        cases.ds_settings(stage, precision),
        config,
        lr=cases.LR,
        total_steps=cases.STEPS,
        precision=precision,
        warmup_steps=cases.WARMUP,
        micro_batch_size=cases.GLOBAL_BATCH,
    )
    losses = [cases.train_step(engine, step) for step in range(8)]
    assert engine.restarts == [3, 6]
    cases.release(engine)
    return losses


@real_gpu
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("stage", [1, 3])
def test_with_ligers_kernels(stage):
    (plain,) = on_gpus(1, losses_with_liger, stage, "fp32", False)
    (found,) = on_gpus(1, losses_with_liger, stage, "fp32", True)  # the classes keep liger's functions: it comes last
    assert found == pytest.approx(plain, rel=1e-3)

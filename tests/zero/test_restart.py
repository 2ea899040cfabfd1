"""The invariants of a restart, at every stage and precision, on two ranks."""

import pytest
import torch.distributed as dist

from tests.parity import cases
from tests.ranks import ranks
from tests.zero.restarts import STAGES, check, restart_by_hand


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_invariants(stage, precision):
    check(ranks(2).run(restart_by_hand, stage, precision))


@pytest.mark.each_value_once
@pytest.mark.parametrize("reset", ["magnitude", "zero", "none"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_reset(stage, reset):
    check(ranks(2).run(restart_by_hand, stage, "fp32", reset=reset))


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_with_the_optimizer_on_cpu(stage, precision):
    check(ranks(2).run(restart_by_hand, stage, precision, offload=True))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, 3])
def test_directly_after_an_evaluation(stage):
    check(ranks(2).run(restart_by_hand, stage, "bf16", after_evaluation=True))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_persistent_small_parameters_and_none(stage):
    """ZeRO-3 keeps small parameters gathered, by default all of this model's; here none, and here all."""
    for threshold in (0, 10**6):
        check(ranks(2).run(restart_by_hand, stage, "bf16", zero={"stage3_param_persistence_threshold": threshold}))


@pytest.mark.parametrize("family", ["gpt_neox", "qwen2"])
def test_other_model_families(family):
    for stage in (1, 3):
        check(ranks(2).run(restart_by_hand, stage, "bf16", family=family))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_three_ranks(stage):
    check(ranks(3).run(restart_by_hand, stage, "bf16"))


def test_one_rank():
    for stage in STAGES:
        check(ranks(1).run(restart_by_hand, stage, "fp32"))


def test_stage_1_with_fp32_accumulation_uses_another_wrapper():
    check(ranks(2).run(restart_with_fp32_accumulation))


def restart_with_fp32_accumulation() -> dict:
    original = cases.ds_settings

    def with_fp32_accumulation(*args, **kwargs):
        return {**original(*args, **kwargs), "data_types": {"grad_accum_dtype": "fp32"}}

    cases.ds_settings = with_fp32_accumulation
    try:
        return restart_by_hand(1, "bf16")
    finally:
        cases.ds_settings = original


def random_pruning(stage) -> dict:
    engine = cases.build(stage, relora=cases.relora_config(optimizer_reset="random"))
    for step in range(3):
        cases.train_step(engine, step)
    engine.restart()
    moments = engine.shards.gather([n for n in engine.shards.names if "lora_" in n], "exp_avg_sq")
    cases.release(engine)
    return {n: (v != 0).nonzero().tolist() for n, v in moments.items()}


def test_random_pruning_draws_the_same_mask_at_every_stage():
    first, *others = [ranks(2).run(random_pruning, stage)[0] for stage in STAGES]
    assert all(len(kept) for name, kept in first.items() if "lora_B" in name)
    assert all(other == first for other in others)


def two_restarts_in_a_row() -> str:
    engine = cases.build(1)
    cases.train_step(engine, 0)
    engine.restart()
    try:
        engine.restart()
    except ValueError as error:
        return str(error)
    finally:
        cases.release(engine)
    return ""


def test_a_second_restart_at_the_same_step_is_an_error():
    assert "there was one at step t=1" in ranks(1).run(two_restarts_in_a_row)[0]


def a_rank_that_misses_a_weight(stage, precision) -> str:
    """Rank 1 throws away one broadcast weight; returns the error."""
    engine = cases.build(stage, precision=precision)
    cases.train_step(engine, 0)
    cases.train_step(engine, 1)
    publish, victim = engine.frozen.publish, next(iter(engine.frozen.layers))

    def forgetful(name, stored, device):
        if name != victim:
            return publish(name, stored, device)
        weight = engine.frozen.layers[name].weight
        piece = weight.ds_tensor if hasattr(weight, "ds_tensor") else weight
        before = piece.data.clone()
        publish(name, stored, device)
        if dist.get_rank() == 1:
            piece.data.copy_(before)
        return None

    engine.frozen.publish = forgetful
    try:
        engine.restart()
    except RuntimeError as error:
        return str(error)
    finally:
        cases.release(engine)
    return ""


@pytest.mark.parametrize("stage, precision", [(1, "fp32"), (1, "bf16"), (3, "fp32"), (3, "bf16")])
def test_ranks_that_disagree_are_noticed_by_all(stage, precision):
    for message in ranks(2).run(a_rank_that_misses_a_weight, stage, precision):
        assert "do not agree on model.layers.0.self_attn.q_proj.weight" in message

"""Parameter groups of the caller's own: Adam's step counts without names of groups, and weight decay of the factors."""

from collections.abc import Callable

import pytest

import relora_ds
from relora_ds.lowrank.inventory import is_lora_parameter, parameter_groups
from relora_ds.zero.moments import max_update_over_lr
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import llama

EVERY = 4
CHAIN = {"trains": "B", "restart_init": "random", "optimizer_reset": "none"}
SETTINGS = {"lr": cases.LR, "total_steps": cases.STEPS, "warmup_steps": cases.WARMUP, "precision": "fp32"}


def default(model) -> list[dict]:
    return parameter_groups(model, weight_decay=0.0)


def factors_and_rest(model) -> list[dict]:
    trains = [(is_lora_parameter(name), p) for name, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p for is_factor, p in trains if is_factor == which]} for which in (True, False)]


def one(model) -> list[dict]:
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


def decayed(model) -> list[dict]:
    """The default ones, as a caller makes them."""
    return parameter_groups(model, weight_decay=0.1)


def build(stage: int, groups: Callable[..., list[dict]], relora: dict | None = None, weight_decay: float = 0.0):
    relora = {"restart_every": EVERY, "restart_warmup_steps": 0, "optimizer_reset": "zero", **(relora or {})}
    model = relora_ds.wrap(llama(), cases.relora_config(**relora))
    own = [{"weight_decay": weight_decay, **group} for group in groups(model)]
    return relora_ds.initialize(
        model, cases.ds_settings(stage, "fp32"), param_groups=own, micro_batch_size=12, **SETTINGS
    )[0]


def go_on(engine, step: int) -> dict:
    """Three steps; the largest update of a factor in the first, in learning rates."""
    losses = [cases.train_step(engine, step)]
    names = [name for name in engine.shards.names if is_lora_parameter(name)]
    largest = max_update_over_lr(engine.shards, names, eps=1e-8, device=engine.device)
    losses += [cases.train_step(engine, step + 1), cases.train_step(engine, step + 2)]
    cases.release(engine)
    return {"losses": losses, "largest": largest}


def saved(stage: int, directory: str, steps: int, relora: dict | None = None) -> dict:
    """With the default groups: a checkpoint after some steps, and what comes after it."""
    engine = build(stage, default, relora)
    for step in range(steps):
        cases.train_step(engine, step)
    engine.save_checkpoint(directory)
    return go_on(engine, steps)


def loaded(stage: int, directory: str, steps: int, groups, relora: dict | None = None) -> dict:
    """The same with groups of the caller's own, in another engine, which has taken a step."""
    engine = build(stage, groups, relora)
    cases.train_step(engine, 100)
    engine.load_checkpoint(directory)
    counts = {is_lora_parameter(name): engine.shards.adam_of(name)[0] for name in engine.shards.names}
    return {"steps": counts, **go_on(engine, steps)}


@pytest.mark.each_value_once
@pytest.mark.parametrize("groups", [factors_and_rest, one])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_groups_with_names_resumes_without(stage, groups, tmp_path):
    """Moments whose group begins at step 0 would be corrected as young ones: steps that are several times as long."""
    whole = ranks(2).run(saved, stage, str(tmp_path), EVERY + 2)[0]
    result = ranks(2).run(loaded, stage, str(tmp_path), EVERY + 2, groups)[0]
    assert result["steps"] == {True: EVERY + 2, False: EVERY + 2}
    assert result["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert result["largest"] == pytest.approx(whole["largest"], rel=1e-6)


@pytest.mark.each_value_once
@pytest.mark.parametrize(("groups", "of_factors"), [(default, 0), (factors_and_rest, 0), (one, EVERY)])
@pytest.mark.parametrize("stage", [1, 3])
def test_the_factors_of_another_chain_begin_at_step_0(stage, groups, of_factors, tmp_path):
    """Where they have groups of their own: others' moments are old."""
    ranks(2).run(saved, stage, str(tmp_path), EVERY, CHAIN)
    result = ranks(2).run(loaded, stage, str(tmp_path), EVERY, groups)[0]
    assert result["steps"] == {True: of_factors, False: EVERY}
    if of_factors == 0:
        assert result["largest"] == pytest.approx(1.0, rel=1e-3), "Adam's first step"
    assert result["losses"][-1] < result["losses"][0] + 0.1


def refused(groups, weight_decay: float) -> str:
    try:
        cases.release(build(1, groups, weight_decay=weight_decay))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_weight_decay_of_both_factors_is_refused():
    """`B·A` would decay twice as fast as W."""
    message = ranks(1).run(refused, one, 0.1)[0]
    assert message.startswith("param_groups: group 0 has weight_decay 0.1 and lora_A, so that lora_B @ lora_A would")
    assert "weight_decay=0" in message
    assert ranks(1).run(refused, one, 0.0) == ["accepted"]
    assert ranks(1).run(refused, decayed, 0.0) == ["accepted"]

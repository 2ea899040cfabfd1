"""A non-finite loss on one rank costs one batch, on every rank, and leaves no other trace."""

import functools
import math

import pytest
import torch
import torch.distributed as dist

import relora_ds
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import cola, crnet
from tests.zero.restarts import fingerprint

GOOD_BEFORE, EVERY, STEPS = 3, 4, 7  # the bad batch stands where the first restart would be due, were it counted


def everything(engine) -> dict[str, str]:
    """One fingerprint for each kind of state, of this rank's own copies where it has any."""
    state = cases.gathered_state(engine)
    return {
        **{what: fingerprint(tree) for what, tree in state.items()},
        "forward": fingerprint(bytes_of(cases.forward_copies(engine))),
        "stored": fingerprint(bytes_of(cases.stored_weights(engine))),
        "frozen masters": fingerprint(engine.frozen.masters),
        "adam steps": str(engine.shards.adam_steps()),
        "lr": str(engine.get_lr()),
        "restarts": str(engine.restarts),
        "t": str(engine.t),
    }


def bytes_of(tree: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.contiguous().view(torch.uint8) for name, value in tree.items()}


def spoiled_step(engine, factor: float) -> None:
    """An optimizer step whose loss is multiplied by `factor` in the first micro-step, on the last rank only."""
    mine = cases.batch(500, cases.GLOBAL_BATCH).chunk(dist.get_world_size())[dist.get_rank()]
    for i, micro in enumerate(mine.chunk(engine.gradient_accumulation_steps())):
        loss = engine(input_ids=micro, labels=micro).loss
        if i == 0 and dist.get_rank() == dist.get_world_size() - 1:
            loss = loss * factor
        engine.backward(loss)
        engine.step()


def changed_by_a_spoiled_step(engine, factor: float) -> list[str]:
    before = everything(engine)
    spoiled_step(engine, factor)
    after = everything(engine)
    return [what for what in before if before[what] != after[what]]


def train(spoil: float | None, **how) -> dict:
    engine = cases.build(relora=cases.relora_config(restart_every=EVERY, restart_warmup_steps=2), **how)
    losses = [cases.train_step(engine, step) for step in range(GOOD_BEFORE)]
    result = {}
    if spoil is not None:
        result["changed"] = changed_by_a_spoiled_step(engine, spoil)
        result["counted"] = (engine.was_step_applied(), engine.t, engine.skipped_steps, engine.global_steps)
    losses += [cases.train_step(engine, step) for step in range(GOOD_BEFORE, STEPS)]
    result.update(losses=losses, restarts=list(engine.restarts), end=everything(engine))
    cases.release(engine)
    return result


@functools.cache
def undisturbed(**how) -> list[dict]:
    return ranks(2).run(train, None, **how)


def check(spoil: str, **how) -> None:
    expected = undisturbed(**how)
    for rank, result in enumerate(ranks(2).run(train, float(spoil), **how)):
        assert result["changed"] == [], f"rank {rank}: the bad batch changed {result['changed']}"
        assert result["counted"] == (False, GOOD_BEFORE, 1, GOOD_BEFORE + 1)
        assert result["restarts"] == [EVERY]
        assert all(math.isfinite(loss) for loss in result["losses"])
        assert result["losses"] == expected[rank]["losses"]
        assert result["end"] == expected[rank]["end"]


@pytest.mark.each_value_once
@pytest.mark.parametrize("spoil", ["nan", "inf"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.slow), 3])  # 1 and 2 share DeepSpeed's class
def test_one_bad_rank(stage, precision, spoil):
    check(spoil, stage=stage, precision=precision)


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_in_the_first_of_two_micro_steps(stage, precision):
    check("nan", stage=stage, precision=precision, accumulation=2)


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_with_the_optimizer_on_cpu(stage, precision):
    check("nan", stage=stage, precision=precision, offload=True)


def of_another_network(make, stage, precision, spoil) -> dict:
    """What a bad batch changes of a network without frozen weights, and the losses of the steps after it."""
    how = dict(lr=1e-3, total_steps=9, precision=precision, micro_batch_size=cases.GLOBAL_BATCH // 2)
    engine, *_ = relora_ds.initialize(make(), cases.ds_settings(stage, precision), **how)
    losses = [cases.train_step(engine, step) for step in range(GOOD_BEFORE)]
    result = {}
    if spoil is not None:
        result["changed"] = changed_by_a_spoiled_step(engine, spoil)
    losses += [cases.train_step(engine, step) for step in range(GOOD_BEFORE, STEPS)]
    result.update(losses=losses, end=everything(engine), applied=engine.t)
    cases.release(engine)
    return result


@pytest.mark.each_value_once
@pytest.mark.parametrize("make", [cola, crnet])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_networks_whose_weights_are_all_trained(make, precision, stage):
    expected = ranks(2).run(of_another_network, make, stage, precision, None)
    for one, other in zip(expected, ranks(2).run(of_another_network, make, stage, precision, math.nan), strict=True):
        assert other.pop("changed") == [] and other == one

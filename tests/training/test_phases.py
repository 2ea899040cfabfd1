"""The phase transition after the warm start: weights, moments and memory."""

import math

import pytest
import torch

from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.planning.cost import cost
from relora_ds.planning.device_memory import DEVICE, HOST, KEPT, total
from relora_ds.planning.network import network_of
from relora_ds.training.phases import build_engine, hand_over, phases_of
from relora_ds.training.preflight import check, resolve
from relora_ds.zero.teardown import release
from tests.ranks import ranks
from tests.zero.live_tensors import live_bytes

OVERRIDES = ["model.preset=llama_9m", "data.vocab_size=512", "warm_start_steps=2", "train.steps=40"]


def overrides(stage, precision, carry) -> list[str]:
    return [
        *OVERRIDES,
        f"deepspeed=zero{stage}",
        f"precision={precision}",
        f"carry_moments={carry}",
        "train.batch_sequences=4",
        "train.micro_batch_size=2",
        "run_dir=unused",
    ]


def _train(engine, plan, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 512, (2, 32), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()


def transition(stage, precision, carry, *more) -> dict:
    plan = check("tiny", [*overrides(stage, precision, carry), *more])
    before = live_bytes()
    warm, low = phases_of(plan.recipe)
    engine = build_engine(plan, warm)
    first_A = {n: engine.shards.gather([n])[n].clone() for n in engine.shards.names if "lora_A" in n}
    _train(engine, plan, 2)
    weights = engine.collect_merged()
    moments = {
        n: {w: engine.shards.gather([n], w)[n].clone() for w in ("exp_avg", "exp_avg_sq")} for n in engine.shards.names
    }
    full_bytes = live_bytes() - before - _size(weights) - sum(_size(m) for m in moments.values())
    engine = build_engine(plan, low, hand_over(engine, plan, low))

    # All masters arrived whole, not as their bf16 copies.
    for name, value in engine.shards.gather(engine.shards.names).items():
        if "lora_" not in name:
            assert torch.equal(value, weights[name]), name
    for name in lowrank_layers(engine.module):
        base = engine.frozen.read(name, engine.device)
        assert base is None or stage == 3 or torch.equal(base, weights[f"{name}.weight"]), name

    steps = engine.shards.adam_steps()
    carried = [n for n in engine.shards.names if "lora_" not in n]
    for name in carried:
        for what in ("exp_avg", "exp_avg_sq"):
            now = engine.shards.gather([name], what)[name]
            assert torch.equal(now, moments[name][what]) if carry else not now.any(), name
    for name in engine.shards.names:
        if "lora_" in name:  # they begin anew, and not where the warm start's began
            assert not engine.shards.gather([name], "exp_avg")[name].any(), name
            assert name not in first_A or not torch.equal(engine.shards.gather([name])[name], first_A[name]), name
    assert steps.pop("lora_A", 0) == 0 and steps == {"lora": 0, "matrices": 2 * carry, "vectors": 2 * carry}
    del weights, moments, now, value
    measured = live_bytes() - before
    _train(engine, plan, 1)
    release(engine)
    return {"full": full_bytes, "measured": measured}


def _size(tensors: dict) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def expected_bytes(stage, precision) -> int:
    """State of the low-rank phase on one rank, as `estimate` computes it."""
    resolved = resolve("tiny", overrides(stage, precision, False), 2, to_run=False)
    method = phases_of(resolved.recipe)[-1].method
    items = cost(resolved, method, network_of(resolved.recipe)[0]).items
    return total(items, DEVICE, KEPT) + total(items, HOST, KEPT)


@pytest.mark.parametrize(
    "stage, precision",
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"))),
        (1, "bf16"),
        (3, "fp32"),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_memory_falls_to_the_formula_of_the_new_phase(stage, precision):
    for result in ranks(2).run(transition, stage, precision, False):
        assert result["measured"] == pytest.approx(expected_bytes(stage, precision), rel=0.05)
        assert result["measured"] < 0.85 * result["full"]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_moments_can_be_carried_over(stage):
    ranks(2).run(transition, stage, "bf16", True)


@pytest.mark.parametrize(("stage", "method"), [(1, "lora"), (3, "galore")])
def test_a_low_rank_warm_start_hands_over_merged_weights(stage, method):
    settings = [f"warm_start_method={method}", "relora.frozen_dtype=int8", "optim.weight_decay=0.1"]
    ranks(2).run(transition, stage, "bf16", True, *settings)


def test_warm_start_has_a_curve_over_the_whole_run():
    plan = check("tiny", ["run_dir=unused", "optim.warm_start_lr=1e-3"])
    warm, low = phases_of(plan.recipe)
    assert (warm.start, warm.stop, warm.total_steps, warm.lr) == (0, 10, 40, 1e-3)
    assert (low.start, low.stop, low.total_steps, low.lr) == (10, 40, 30, 5e-3)
    assert math.isclose(low.total_steps + warm.stop, plan.recipe.total_steps)


def last_rates_of_warm_start(*settings: str) -> list[float]:
    """The learning rates of the warm start's last two steps, in its engine."""
    plan = check("tiny", ["run_dir=unused", *settings])
    warm, _ = phases_of(plan.recipe)
    engine = build_engine(plan, warm)
    rates = []
    for t in (warm.stop - 2, warm.stop - 1):
        engine.lr_scheduler.move_to(t)
        rates.append(engine.lr_scheduler.get_last_lr()[0])
    release(engine)
    return rates


@pytest.mark.parametrize("warm", ["warm_start_method=relora", "optim.warm_start_warmup_steps=41"])
def test_wsd_has_no_decay_in_a_warm_start_that_its_ramp_or_warm_up_could_meet(warm):
    """It would begin after step 40 of 42, where the warm start's curve has a restart, or its warm-up, at that time."""
    settings = ["method=galore", "optim.schedule=wsd", "train.steps=42", "warm_start_steps=14", warm]
    [rates] = ranks(1).run(last_rates_of_warm_start, *settings, "relora.restart_warmup_steps=2", "optim.lr=1.0")
    assert rates == ([1.0, 1.0] if "relora" in warm else [12 / 41, 13 / 41])

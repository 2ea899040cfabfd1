"""Residual updates between restarts: what they write, what they forget, and that checkpoints have all of it."""

import json
import math
from pathlib import Path

import pytest
import torch

from relora_ds.lowrank.precision import exact_products
from tests.parity import cases
from tests.ranks import ranks
from tests.zero.restarts import BLOCKS, fingerprint
from tests.zero.test_nonfinite import bytes_of, everything, spoiled_step

EVERY, RESTART_EVERY = 3, 6


def build(stage, precision="fp32", every=EVERY, **how):
    relora = how.pop("relora", {})
    own = dict(residual_every=every, restart_every=RESTART_EVERY, restart_warmup_steps=2)
    return cases.build(stage, precision=precision, relora=cases.one_sided_config(**{**own, **relora}), **how)


def train(engine, start: int, stop: int) -> list[float]:
    return [cases.train_step(engine, step) for step in range(start, stop)]


# -- what an update writes -------------------------------------------------------------------------------------------


def written(stage, precision, weight_decay=0.0, **frozen) -> dict:
    """A period, and every owner's part of its update checked."""
    engine = build(stage, precision, relora=frozen, weight_decay=weight_decay, **BLOCKS)
    frozen, changes = engine.frozen, []
    train(engine, 0, EVERY - 1)
    before = {name: frozen.read(name, engine.device) for name in frozen.layers}
    stored_before = cases.stored_weights(engine)
    bases = {name: frozen.read_A(name) for name in frozen.layers}
    update = engine.residual._update

    def spy(gradient):
        assert gradient.dtype == torch.float32 and gradient.any()
        changes.append(update(gradient))
        return changes[-1].clone()

    engine.residual._update = spy
    train(engine, EVERY - 1, EVERY)
    factor, rho = engine.lr_scheduler.last_multiplier, next(iter(frozen.layers.values())).rho
    assert factor == 0.5 and (rho < 1) == (weight_decay > 0)
    stored = cases.stored_weights(engine)
    after = {name: frozen.read(name, engine.device) for name in frozen.layers}
    owned = [name for names in frozen.rounds() for name in names if name in frozen.owned()]
    for name, change in zip(owned, changes, strict=True):
        expected = before[name] + change * (factor / rho)
        if frozen.with_masters or precision == "fp32" == frozen.storage.dtype:
            torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(frozen.quantize(after[name]).reshape(-1), stored[name].reshape(-1)), name
        with exact_products():  # nothing of it lies in the basis, which is rounded to what computes
            inside = (change @ bases[name].mT).norm() / change.norm()
        assert inside < (1e-5 if precision == "fp32" else 0.05), (name, inside)
    assert all(not torch.equal(stored[name], stored_before[name]) for name in stored)
    assert engine.residual.steps == 0 and engine.residual.count == 1
    assert not any(layer.gradient_sum.values.any() for layer in frozen.layers.values())
    result = {"stored": fingerprint(bytes_of(stored)), "seconds": engine.residual.seconds}
    engine.restart_if_due()
    train(engine, EVERY, RESTART_EVERY + 1)
    result["merge_loss_total"] = engine.last_restart.merge_loss_total
    cases.release(engine)
    return result


@pytest.mark.parametrize(
    ("stage", "precision", "frozen"),
    [
        pytest.param(0, "bf16", {}, marks=pytest.mark.slow),
        (1, "bf16", {"frozen_dtype": "int8"}),
        pytest.param(2, "bf16", {"frozen_master": "device"}, marks=pytest.mark.slow),
        (3, "bf16", {"frozen_dtype": "nf4"}),
        pytest.param(3, "fp32", {"frozen_dtype": "int8", "frozen_placement": "replicated"}, marks=pytest.mark.slow),
        pytest.param(3, "bf16", {"frozen_dtype": "fp8"}, marks=pytest.mark.slow),
        pytest.param(3, "fp32", {}, marks=pytest.mark.slow),
        pytest.param(1, "bf16", {"frozen_master": "none"}, marks=pytest.mark.slow),
        (3, "bf16", {"frozen_master": "none"}),
        pytest.param(1, "bf16", {"frozen_dtype": "int8", "frozen_master": "none"}, marks=pytest.mark.slow),
    ],
)
def test_masters_and_stored_copies_get_the_change(stage, precision, frozen):
    results = ranks(2).run(written, stage, precision, **frozen)
    assert results[0]["stored"] == results[1]["stored"]
    assert all(result["seconds"] > 0 for result in results)


def test_under_weight_decay_w_gets_more_than_forward_sees():
    ranks(2).run(written, 1, "fp32", weight_decay=1.0)


# -- beside what else looks at gradients -----------------------------------------------------------------------------


def losses_of(stage, every, estimate) -> list[float]:
    """With updates of 0, where there are any."""
    engine = build(stage, every=every, relora=dict(restart_init="gradient", gradient_estimate=estimate))
    if engine.residual is not None:
        engine.residual._update = torch.zeros_like
    losses = train(engine, 0, 8)
    cases.release(engine)
    return losses


@pytest.mark.each_value_once
@pytest.mark.parametrize("estimate", ["sketch", "warm_sketch", "exact"])
@pytest.mark.parametrize("stage", [1, 3])
def test_the_next_basis_is_what_it_is_without_them(stage, estimate):
    without = ranks(2).run(losses_of, stage, None, estimate)
    assert ranks(2).run(losses_of, stage, EVERY, estimate) == without


def restarted_by_hand(stage) -> dict:
    engine = build(stage)
    train(engine, 0, 2)
    before = fingerprint(bytes_of(cases.stored_weights(engine)))
    engine.restart()
    result = {"updates": engine.residual.count, "steps": engine.residual.steps, "restarts": engine.restarts[:]}
    result["changed"] = fingerprint(bytes_of(cases.stored_weights(engine))) != before
    train(engine, 2, 3)
    result["after"] = engine.residual.count
    cases.release(engine)
    return result


def test_a_restart_by_hand_ends_a_period_early():
    for found in ranks(2).run(restarted_by_hand, 3):
        assert found == {"updates": 1, "steps": 0, "restarts": [2], "changed": True, "after": 2}


# -- steps that are not applied --------------------------------------------------------------------------------------


def with_a_bad_step(stage, precision, spoil, accumulation) -> dict:
    """`spoil`: the loss of a second step by this factor; None: without it, but the sums begin anew there."""
    engine = build(stage, precision, accumulation=accumulation)
    if spoil is None:
        train(engine, 0, 1)
        engine.residual.drop()
    else:
        train(engine, 0, 1)
        spoiled_step(engine, spoil)
        assert not engine.was_step_applied() and engine.residual.steps == 0
    losses = train(engine, 1, 8)
    assert engine.residual.count == 2 and engine.restarts == [RESTART_EVERY]
    result = {"losses": losses, "end": everything(engine)}
    cases.release(engine)
    return result


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("stage", "precision", "spoil"), [(0, "fp32", "nan"), (1, "bf16", "inf"), (3, "bf16", "nan")])
def test_a_bad_step_on_one_rank_gives_up_what_the_period_has(stage, precision, spoil, accumulation):
    expected = ranks(2).run(with_a_bad_step, stage, precision, None, accumulation)
    found = ranks(2).run(with_a_bad_step, stage, precision, float(spoil), accumulation)
    assert all(math.isfinite(loss) for loss in found[0]["losses"])
    assert found == expected


def with_a_bad_sum(stage) -> tuple[bool, bool]:
    """A sum that overflows without B's gradient doing so: that layer's W stays, the others get theirs."""
    engine = build(stage)
    train(engine, 0, EVERY - 1)
    bad, good = list(engine.frozen.layers)[:2]
    engine.frozen.layers[bad].gradient_sum.values.view(-1)[0] = math.inf
    before = cases.stored_weights(engine)
    train(engine, EVERY - 1, EVERY)
    after = cases.stored_weights(engine)
    cases.release(engine)
    return torch.equal(before[bad], after[bad]), torch.equal(before[good], after[good])


def test_a_sum_that_is_not_finite_changes_nothing():
    assert ranks(2).run(with_a_bad_sum, 1) == [(True, False)] * 2


def with_whole_bases() -> list[bool]:
    """Whether W changes in a layer whose basis spans all inputs, and in one whose does not."""
    engine = build(1, relora=dict(r=20))
    before = cases.stored_weights(engine)
    train(engine, 0, EVERY)
    after = cases.stored_weights(engine)
    layers = engine.frozen.layers
    narrow, wide = (next(name for name, layer in layers.items() if layer.in_features == size) for size in (20, 35))
    cases.release(engine)
    return [not torch.equal(before[name], after[name]) for name in (narrow, wide)]


def test_what_is_left_of_a_whole_basis_is_rounding_and_not_orthogonalised():
    assert ranks(2).run(with_whole_bases) == [[False, True]] * 2


# -- checkpoints -----------------------------------------------------------------------------------------------------

END = 11


def saved_run(stage, precision, directory, at) -> dict:
    engine = build(stage, precision, weight_decay=0.1)
    losses = []
    for saved_at in at:  # a second save has what the first one gave to the owners
        losses += train(engine, len(losses), saved_at)
        engine.save_checkpoint(directory, tag=f"at_{saved_at}")
    result = {"losses": losses + train(engine, at[-1], END), "end": everything(engine), "count": engine.residual.count}
    cases.release(engine)
    return result


def resumed_run(stage, precision, directory, at, world=None) -> dict:
    engine = build(stage, precision, weight_decay=0.1, model_seed=1)
    train(engine, 100, 102)
    engine.load_checkpoint(directory, tag=f"at_{at}")
    engine.save_checkpoint(f"{directory}/again", tag="again")  # before a step: what owners have is written again
    losses = train(engine, at, END)
    weights = engine.collect_merged()
    result = {"losses": losses, "end": everything(engine), "count": engine.residual.count, "weights": weights}
    cases.release(engine)
    return result


@pytest.mark.each_value_once
@pytest.mark.parametrize("at", [[4], [4, 5], [2, 4], [3], [6]], ids=str)
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_run_resumes_to_the_bit(stage, precision, at, tmp_path):
    expected = ranks(2).run(saved_run, stage, precision, str(tmp_path), at)
    for rank, found in enumerate(ranks(2).run(resumed_run, stage, precision, str(tmp_path), at[-1])):
        assert found["losses"] == expected[rank]["losses"][at[-1] :]
        assert found["end"] == expected[rank]["end"]
        assert found["count"] == expected[rank]["count"] == END // EVERY


def test_sums_are_saved_within_a_period_only(tmp_path):
    ranks(2).run(saved_run, 1, "fp32", str(tmp_path), [3, 4])
    steps = [json.loads((tmp_path / f"at_{at}/manifest.json").read_text())["engine"]["residual"] for at in (3, 4)]
    assert steps == [{"steps": 0, "count": 1}, {"steps": 1, "count": 1}]
    at_3, at_4 = (sum(file.stat().st_size for file in (tmp_path / f"at_{at}").glob("trained*")) for at in (3, 4))
    weights = 3 * (4 * 20 * 20 + 3 * 20 * 35)
    assert 4 * weights < at_4 - at_3 < 4.2 * weights


@pytest.mark.parametrize(
    ("old", "new"),
    [((2, 1), (1, 3)), pytest.param((1, 0), (2, 2), marks=pytest.mark.slow)],
)
def test_another_number_of_ranks_at_another_stage_goes_on_with_the_period(old, new, tmp_path):
    expected = ranks(old[0]).run(saved_run, old[1], "fp32", str(tmp_path), [4])[0]
    found = ranks(new[0]).run(resumed_run, new[1], "fp32", str(tmp_path), 4)[0]
    worst = max(abs(a - b) / b for a, b in zip(found["losses"], expected["losses"][4:], strict=True))
    assert worst <= 1e-5


def loaded_without_moments(directory) -> int:
    engine = build(1)
    train(engine, 0, 1)
    engine.load_checkpoint(directory, load_module_only=True)
    steps = engine.residual.steps
    assert not any(layer.gradient_sum.values.any() for layer in engine.frozen.layers.values())
    cases.release(engine)
    return steps


def test_weights_alone_begin_another_period(tmp_path):
    ranks(2).run(saved_run, 1, "fp32", str(tmp_path), [4])
    assert ranks(2).run(loaded_without_moments, str(Path(tmp_path))) == [0, 0]

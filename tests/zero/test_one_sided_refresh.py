"""What a refresh of a one-sided chain does to the weights, the basis, B and its moments, on two ranks."""

import pytest
import torch

import relora_ds
from tests.parity import cases
from tests.parity.one_sided import rotated
from tests.ranks import ranks
from tests.small_models import llama
from tests.zero.restarts import DTYPES, fingerprint, frozen_masters

EVERY = 4


def state(engine) -> dict:
    gathered = cases.gathered_state(engine)
    return {
        "W": frozen_masters(engine),
        "A": {name: engine.frozen.read_A(name).cpu() for name in engine.frozen.layers},
        "B": {name: gathered["master"][f"{name}.lora_B"] for name in engine.frozen.layers},
        "m": {name: gathered["exp_avg"][f"{name}.lora_B"] for name in engine.frozen.layers},
        "v": {name: gathered["exp_avg_sq"][f"{name}.lora_B"] for name in engine.frozen.layers},
    }


def second_refresh(stage, precision, reset) -> str:
    """Train to the second refresh, whose old basis is of the first, and check it; returns what ranks must agree on."""
    relora = cases.one_sided_config(restart_init="gradient", optimizer_reset=reset, restart_every=EVERY)
    engine, dtype = cases.build(stage, precision=precision, relora=relora), DTYPES[precision]
    seen: dict = {}

    def watched(engine):
        if engine.t == 2 * EVERY:
            seen["before"], seen["rho"] = state(engine), float(engine.frozen.decay)
        engine.restart_if_due()

    engine.after_step = watched
    for step in range(2 * EVERY):
        cases.train_step(engine, step)
    assert engine.restarts == [EVERY, 2 * EVERY]
    before, after = seen["before"], state(engine)
    for name in before["W"]:
        A, B = before["A"][name], before["B"][name]
        assert torch.equal(A, A.to(dtype).float()), "forward cannot hold this basis"
        merged = seen["rho"] * before["W"][name].double() + cases.SCALING * B.double() @ A.double()
        assert B.norm() > 1e-3 and (after["W"][name] - merged).abs().max() <= 1e-6 * merged.abs().max()
        assert not after["B"][name].any()
        new = after["A"][name]
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        assert not torch.allclose(new, A) and (new @ new.T - torch.eye(len(new))).abs().max() <= rounding
        largest = new.gather(1, new.abs().argmax(1, keepdim=True))
        assert (largest > 0).all(), "a sign is free"
        moments = before["m"][name], before["v"][name]
        if reset == "rotate":
            exact = (value.double() for value in (*moments, A @ new.T))
            moments = rotated(*exact, betas=(0.9, 0.999), count=2 * EVERY)
        for moment, expected in zip("mv", moments, strict=True):
            difference = (after[moment][name] - expected).abs().max() / expected.abs().max()
            assert difference <= (1e-5 if reset == "rotate" else 0), f"{name}: {moment} is not what {reset} makes of it"
    cases.release(engine)
    return fingerprint(after)


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    ("stage", "precision", "reset"),
    [(0, "bf16", "rotate"), (1, "bf16", "none"), (2, "fp32", "rotate"), (3, "bf16", "rotate"), (3, "fp32", "none")],
)
def test_the_second_refresh(stage, precision, reset):
    first, second = ranks(2).run(second_refresh, stage, precision, reset)
    assert first == second


def losses(stage, *, own_groups: bool) -> list[float]:
    """Two cycles, whose moments are rotated, in one parameter group of the caller's, or in the default ones."""
    model = relora_ds.wrap(llama(), cases.one_sided_config(restart_every=EVERY, restart_warmup_steps=0))
    own = [{"params": [p for p in model.parameters() if p.requires_grad]}] if own_groups else None
    settings = {"lr": cases.LR, "total_steps": cases.STEPS, "precision": "fp32", "micro_batch_size": 12}
    engine, *_ = relora_ds.initialize(model, cases.ds_settings(stage, "fp32"), param_groups=own, **settings)
    found = [cases.train_step(engine, step) for step in range(2 * EVERY)]
    cases.release(engine)
    return found


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)])
def test_parameter_groups_may_have_no_names(stage):
    own, default = (ranks(2).run(losses, stage, own_groups=own)[0] for own in (True, False))
    assert own == pytest.approx(default, rel=1e-6)

"""Training with restarts equals plain single-process PyTorch, at every ZeRO stage."""

import functools

import pytest
import torch

from tests.parity import cases
from tests.parity.cases import EVERY, STEPS
from tests.ranks import ranks

RESTARTS = [EVERY * i for i in range(1, 5)]
SHORT = 3 * EVERY + 7  # steps: through three of the four restarts, for what differs from the plain case in one way
reference_losses = functools.cache(cases.reference_losses)


def _compare(result: dict, expected: list[float], tolerance: float, steps: int = SHORT) -> None:
    assert len(result["losses"]) == steps and RESTARTS[-1] < STEPS
    assert result["restarts"] == [restart for restart in RESTARTS if restart < steps]
    assert len(result["norms"]) == len(result["restarts"]) and min(result["norms"]) > 1e-3, (
        "B was 0 before a restart: nothing was merged"
    )
    worst = max(abs(a - b) / abs(b) for a, b in zip(result["losses"], expected[:steps], strict=True))
    assert worst <= tolerance, f"losses differ by {worst:.2e}"
    assert result["losses"][-1] < result["losses"][0] - 0.1


@pytest.mark.each_value_once
@pytest.mark.parametrize("reset", ["zero", "magnitude_joint", "none"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_equal_plain_pytorch(stage, reset):
    results = ranks(2).run(cases.train_case, stage=stage, relora=cases.relora_config(optimizer_reset=reset))
    _compare(results[0], reference_losses(reset), 1e-6, STEPS)
    assert results[0]["losses"] == results[1]["losses"]


@pytest.mark.slow  # test_one_sided.py has one that is quick
@pytest.mark.parametrize("stage", range(4))
def test_with_gradient_accumulation(stage):
    result = ranks(2).run(cases.train_case, SHORT, stage=stage, accumulation=3)[0]  # a first, a middle and a last one
    _compare(result, reference_losses("magnitude_joint"), 1e-6)


@pytest.mark.slow  # test_one_sided.py has one that is quick
@pytest.mark.parametrize("stage", [1, 3])
def test_folded_products(stage):
    """Another order of the same products: a rounding more in each layer and step."""
    relora = cases.relora_config(product="folded")
    _compare(
        ranks(2).run(cases.train_case, SHORT, stage=stage, relora=relora)[0], reference_losses("magnitude_joint"), 1e-5
    )


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_with_the_optimizer_on_cpu(stage):
    result = ranks(2).run(cases.train_case, SHORT, stage=stage, offload=True)[0]
    _compare(result, reference_losses("magnitude_joint"), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_three_ranks(stage):
    _compare(ranks(3).run(cases.train_case, SHORT, stage=stage)[0], reference_losses("magnitude_joint"), 1e-6)


@pytest.mark.parametrize(
    "stage, family",
    [
        pytest.param(1, "gpt_neox", marks=pytest.mark.slow),  # its restarts: tests/zero/test_restart.py
        pytest.param(3, "qwen2", marks=pytest.mark.slow),
        *(
            pytest.param(
                stage, family, marks=[] if (stage, family) in ((3, "gpt2"), (1, "mixtral")) else pytest.mark.slow
            )
            for family in ("gpt2", "mixtral")
            for stage in range(4)
        ),
    ],
)
def test_other_model_families(stage, family):
    result = ranks(2).run(cases.train_case, SHORT, stage=stage, family=family)[0]
    _compare(result, reference_losses("magnitude_joint", family), 2e-6)


def follow_each_cycle(stage: int) -> float:
    """The worst relative loss difference to a reference that takes over the engine's state after every restart."""
    engine = cases.build(stage, relora=cases.relora_config(optimizer_reset="magnitude"))
    reference = cases.make_reference("magnitude")
    worst = 0.0
    for step in range(STEPS):
        ours, theirs = cases.train_step(engine, step), reference.step(cases.batch(step, cases.GLOBAL_BATCH))
        worst = max(worst, abs(ours - theirs) / theirs)
        if engine.restarts and engine.restarts[-1] == engine.t:
            reference.restarts += 1
            for decayed in (reference, *reference.layers.values()):
                decayed.left = 1.0  # what decay took of W is merged
            state, stored = cases.gathered_state(engine), cases.stored_weights(engine)
            with torch.no_grad():
                for name, parameter in reference.model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(state["master"][name])
                        for moment in ("exp_avg", "exp_avg_sq"):
                            reference.adam.state[parameter][moment].copy_(state[moment][name])
                    else:
                        parameter.copy_(stored[name.removesuffix(".weight")])
    assert engine.restarts == RESTARTS
    cases.release(engine)
    return worst


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_authors_magnitude_pruning_between_restarts(stage):
    """Its masks flip on rounding: test_restart compares the state at a restart, this one the losses between them."""
    assert max(ranks(2).run(follow_each_cycle, stage)) <= 1e-5

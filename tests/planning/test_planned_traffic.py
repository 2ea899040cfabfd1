"""Bytes of a step and of a restart, against what real engines send."""

import pytest
import torch

from relora_ds.planning.cost import cost
from relora_ds.planning.device_memory import at_stage
from relora_ds.planning.network import network_of
from relora_ds.training.phases import phases_of
from relora_ds.training.preflight import resolve
from relora_ds.zero.teardown import release
from relora_ds.zero.traffic import count_traffic
from tests.planning.engines import build, micro_step, overrides, planned, sent_in_a_step
from tests.ranks import ranks
from tests.training.runs import lines, run

RESIDUAL = "relora.residual_every=10"
ONE_SIDED = ("relora.trains=B", "relora.restart_init=gradient", "relora.optimizer_reset=none")


def sent(changes: list[str]) -> dict[str, tuple[float, float]]:
    """On a rank: `(payload, wire)` of the third step and of a restart after it, with a drift probe as training has."""
    engine = build(changes)
    tokens = torch.arange(8).view(2, 4)
    engine.drift_probe = lambda: engine.module(input_ids=tokens).logits
    for step in range(2):
        micro_step(engine, step)
        engine.step()
    engine.lr_scheduler.is_scheduled = lambda t: t == 3  # so that the third step takes a gradient along,
    engine.after_step = lambda engine: None  # and the restart is counted by itself
    with count_traffic() as a_step:
        micro_step(engine, 2)
        engine.step()
    found = {"step": a_step}
    if engine.residual is not None:
        engine.residual.drop()  # else the restart would end a period
    with count_traffic() as found["restart"]:
        engine.restart()
    if engine.residual is not None:
        micro_step(engine, 3)
        engine.step()
        with count_traffic() as found["residual"]:
            engine.residual.apply(1.0)
            micro_step(engine, 4)
            engine.step()
    release(engine)
    return {name: (traffic.payload, traffic.wire) for name, traffic in found.items()}


@pytest.mark.parametrize(
    "stage, precision, more",
    [
        pytest.param(0, "bf16", (), marks=pytest.mark.slow),
        pytest.param(1, "fp32", (), marks=pytest.mark.slow),
        pytest.param(1, "bf16", ("relora.optimizer_reset=magnitude",), marks=pytest.mark.slow),
        (2, "bf16", ("relora.optimizer_reset=zero",)),
        pytest.param(3, "bf16", (), marks=pytest.mark.slow),
        pytest.param(3, "fp32", (), marks=pytest.mark.slow),
        pytest.param(1, "fp32", ("relora.frozen_dtype=nf4",), marks=pytest.mark.slow),
        (3, "fp32", ("relora.frozen_dtype=nf4", "relora.frozen_master=none", "activation_checkpointing=full")),
        pytest.param(
            3,
            "fp32",
            ("relora.frozen_dtype=int8", "relora.frozen_placement=replicated", "relora.frozen_master=none"),
            marks=pytest.mark.slow,
        ),
        pytest.param(1, "bf16", ("relora.restart_init=gradient",), marks=pytest.mark.slow),
        (0, "fp32", (*ONE_SIDED, "relora.optimizer_reset=rotate")),
        pytest.param(1, "bf16", ONE_SIDED, marks=pytest.mark.slow),
        pytest.param(3, "bf16", (*ONE_SIDED, "relora.optimizer_reset=rotate"), marks=pytest.mark.slow),
        pytest.param(
            3,
            "fp32",
            (*ONE_SIDED, "relora.frozen_dtype=int8", "relora.frozen_placement=replicated"),
            marks=pytest.mark.slow,
        ),
        (1, "bf16", (*ONE_SIDED, RESIDUAL)),
        pytest.param(3, "bf16", (*ONE_SIDED, RESIDUAL), marks=pytest.mark.slow),
        pytest.param(3, "fp32", (*ONE_SIDED, RESIDUAL), marks=pytest.mark.slow),
        (3, "fp32", (*ONE_SIDED, RESIDUAL, "relora.frozen_dtype=nf4", "relora.frozen_placement=replicated")),
    ],
)
def test_bytes_are_those_that_are_sent(stage, precision, more):
    changes = overrides(stage, precision, "relora", 1, *more)
    expected = planned(changes)
    for result in ranks(2).run(sent, changes):
        assert result["step"] == pytest.approx(expected.step, rel=0.01)
        assert result["restart"] == pytest.approx(expected.restart, rel=0.01)
        if expected.residual is not None:  # with a step after it
            both = [update + step for update, step in zip(expected.residual, expected.step, strict=True)]
            assert result["residual"] == pytest.approx(both, rel=0.01)


@pytest.mark.parametrize(
    "stage, precision, method",
    [
        (0, "fp32", "muon"),
        pytest.param(1, "bf16", "fira", marks=pytest.mark.slow),
        pytest.param(2, "bf16", "muon", marks=pytest.mark.slow),
        pytest.param(3, "bf16", "muon", marks=pytest.mark.slow),
        (3, "bf16", "scale"),
        pytest.param(1, "bf16", "sst", marks=pytest.mark.slow),
    ],
)
def test_bytes_of_a_step_with_owners(stage, precision, method):
    changes = overrides(stage, precision, method)
    for result in ranks(2).run(sent_in_a_step, changes):
        assert result == pytest.approx(planned(changes).step, rel=0.01)


def test_a_restart_in_training_at_stage_3(tmp_path):
    changes = [
        "model.preset=llama_20m",
        "warm_start_steps=0",
        "deepspeed=zero3",
        "precision=fp32",
        "train.steps=5",
        "relora.restart_every=4",
        "relora.restart_warmup_steps=1",
        "train.batch_sequences=2",
        "train.micro_batch_size=1",
        "eval.samples=0",
    ]
    run(tmp_path, *changes)
    resolved = resolve("tiny", changes, 2, to_run=False)
    (phase,) = phases_of(resolved.recipe)
    expected = cost(resolved, phase.method, network_of(resolved.recipe)[0])
    taken = {line["step"]: line for line in lines(tmp_path, "train")}
    for figure, step, restart in zip(("bytes_payload", "bytes_wire"), expected.step, expected.restart, strict=True):
        assert taken[3][figure] == pytest.approx(step, rel=0.01)
        assert taken[4][figure] - taken[3][figure] == pytest.approx(restart, rel=0.01)


def test_a_network_above_what_stage_3_keeps_is_gathered_twice():
    resolved = resolve(
        "tiny",
        [
            "model.preset=llama_7b",
            "data.vocab_size=32000",
            "relora.r=128",
            "precision=bf16",
            "deepspeed=zero3",
            "train.batch_sequences=64",
        ],
        8,
        to_run=False,
    )
    method = phases_of(resolved.recipe)[-1].method
    result = cost(resolved, method, network_of(resolved.recipe)[0])
    trainable, everything = result.shapes.num_trainable, result.shapes.num_trainable + result.shapes.num_frozen
    assert everything > 6e9 and result.accumulation == 2
    norms = 65 * 4096  # kept whole, and gathered once
    assert result.step[0] == 2 * (2 * (trainable + 2 * (everything - norms)) + norms)


def test_a_world_size_that_does_not_divide_the_batch_has_a_state_and_no_step():
    resolved = resolve("tiny", [], 1, to_run=False)
    method = phases_of(resolved.recipe)[-1].method
    result = cost(resolved, method, network_of(resolved.recipe)[0], world_size=3)
    assert result.accumulation is None and result.step is None and result.items


def test_another_stage_drops_the_offloading_that_it_does_not_have():
    config = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    }
    assert at_stage(config, 2) == {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert at_stage(config, 0) == {"zero_optimization": {"stage": 0}}
    assert config["zero_optimization"]["stage"] == 3

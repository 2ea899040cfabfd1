"""The parts of a step add up, speeds are quotients of what was timed in turns, and FLOPs are those that are done."""

import argparse
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import relora_ds.lowrank.kernels  # noqa: F401 (the operators)
from relora_ds.lab.bench import baselines, throughput
from tests.ranks import ranks

SHAPE = {"preset": "llama_9m", "r": 16, "vocab_size": 1000, "seq_len": 64, "precision": "fp32", "stage": 1}


def measured() -> dict:
    return throughput.measure(
        argparse.Namespace(
            **SHAPE, micro_batch_size=[1, 2], repeats=2, variants=["full rank", "PEFT, its default", "ours, dense"]
        )
    )


def test_every_variant_at_every_size():
    (result,) = ranks(1).run(measured)
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        parts = row["parts_s"]
        assert all(seconds >= 0 for seconds in parts.values()), row
        assert min(parts["forward"], parts["backward"], parts["optimizer"]) > 0
        assert len(row["steps_s"]) == 2 and throughput.speed_of(row, result["rows"]) > 0
    table = throughput.markdown(result)
    assert table.count("| ours, dense |") == 3 and "Each at its best micro-batch" in table


def test_a_speed_compares_steps_of_the_same_turn():
    full = {"variant": "full rank", "micro_batch_size": 1, "steps_s": [2.0, 4.0, 60.0]}
    ours = {"variant": "ours, dense", "micro_batch_size": 1, "steps_s": [1.0, 4.0, 20.0]}
    other_size = {**full, "micro_batch_size": 2, "steps_s": [1.0, 1.0, 1.0]}
    assert throughput.speed_of(ours, [other_size, full, ours]) == 2
    assert throughput.speed_of(ours, [{**full, "error": "out of memory"}, ours]) is None


def counted_flops(variant: str) -> tuple[float, float]:
    """Per token: what torch counts in a forward and backward, and the formula without attention."""
    from relora_ds.zero.teardown import release

    spec = baselines.Spec(variant, micro_batch_size=2, **SHAPE)
    engine = baselines.build(spec)
    config = engine.module.config
    baselines.step(engine, spec, 0)
    with FlopCounterMode(display=False, custom_mapping=LAYER) as counter:
        baselines.step(engine, spec, 1)
    release(engine)
    attention = 6 * config.num_hidden_layers * config.hidden_size * spec.seq_len  # of which torch counts nothing here
    return (
        counter.get_total_flops() / (spec.micro_batch_size * spec.seq_len),
        baselines.flops_per_token(spec) - attention,
    )


def linear_flops(rows, weight, h, lora_B, *_, **__) -> int:  # torch passes shapes
    out_features, r = lora_B
    product = r * out_features * (rows[1] if h is None else rows[0])  # B·A, or h·Bᵀ
    return 2 * (rows[0] * out_features * rows[1] + product)


def input_grad_flops(g, weight, gB, lora_A, *_, **__) -> int:
    r, in_features = lora_A
    product = r * in_features * (g[1] if gB is None else g[0])  # B·A, or gB·A
    return 2 * (g[0] * g[1] * in_features + product)


LAYER = {
    torch.ops.relora_ds.product: lambda a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.relora_ds.linear: linear_flops,
    torch.ops.relora_ds.linear_input_grad: input_grad_flops,
}


@pytest.mark.parametrize(
    "variant",
    [
        "full rank",
        "ours, dense",
        "ours, LoRA alone",
        "PEFT, same modules train",
        "ours, folded",
        "ours, one-sided, separate",
        "ours, one-sided, folded",
        "CoLA",
        "CR-Net",
    ],
)
def test_flops_are_what_torch_counts(variant):
    counted, formula = ranks(1).run(counted_flops, variant)[0]
    # The formula takes vectors, which nothing is multiplied with, for matrices, and has the first layer pass a gradient
    # on to embeddings that are frozen: less than 3 % even here.
    assert counted == pytest.approx(formula, rel=0.03)


@pytest.mark.parametrize(
    ("threads", "world_size", "device", "own"),
    [(1, 1, "cpu", True), (2, 1, "cpu", False), (1, 2, "cpu", False), (1, 1, "cuda", False)],
)
def test_one_thread_alone_on_a_cpu_is_timed_by_its_own_clock(threads, world_size, device, own, monkeypatch):
    monkeypatch.setattr(throughput, "_device", lambda: device)
    monkeypatch.setattr(throughput.dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert (throughput._clock() is time.process_time) is own

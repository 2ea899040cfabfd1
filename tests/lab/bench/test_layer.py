"""The benchmark of one layer: what it times, how it counts, and that it runs; never how fast."""

import argparse
import importlib.util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from relora_ds.lab.bench import layer as bench
from relora_ds.lab.bench import layer_timing
from relora_ds.lowrank.nf4 import NF4


def tiny_arguments(*given):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--rows", "8", "--repetitions", "2", *given])


def test_a_tiny_run_in_every_precision():
    result = bench.run(tiny_arguments("--hidden", "32", "64", "--r", "4", "--precision", "fp32", "bf16", "fp16"))
    assert [(e["precision"], e["hidden"], e["r"], e["rows"]) for e in result["measured"]] == [
        (precision, hidden, 4, 8) for precision in ("fp32", "bf16", "fp16") for hidden in (32, 64)
    ]
    entry = result["measured"][0]
    assert list(entry["ms"]) == ["full", "naive", "peft", "dense", "bf16", "int8", "fp8", "nf4", "nf4_double"]
    assert entry["over_full"].keys() == entry["ms"].keys() == entry["over_naive"].keys()
    assert all(ms > 0 for ms in entry["ms"].values())
    assert entry["over_full"]["full"] == 1 and entry["over_naive"]["naive"] == 1 and entry["over_peft"]["peft"] == 1
    text = bench.markdown(result)
    assert "Speed over full rank; fp32, 8 tokens:" in text and "| 64 | 4 |" in text
    assert "Lowest speed over naive LoRA: dense " in text and "Lowest speed over PEFT: dense " in text


def test_a_tiny_run_of_products():
    result = bench.run(
        tiny_arguments("--compare", "products", "--hidden", "64", "--r-part", "16", "4", "--precision", "fp32")
    )
    assert [entry["r"] for entry in result["measured"]] == [4, 16]
    entry = result["measured"][0]
    names = ["both, separate", "both, folded", "B, separate", "B, folded"]
    assert list(entry["ms"]) == ["full", "naive", "peft", *names]
    assert list(entry["ceilings"]) == names and entry["folds"] == {"both": False, "B": False}
    assert entry["gains"].keys() == {"both", "B"} and min(entry["gains"].values()) > 0
    text = bench.markdown(result)
    assert "in parentheses what the FLOPs allow; fp32, 8 tokens:" in text and "| 64 | 16 |" in text
    assert "`auto` does not fold so few tokens" in text and "lowest" not in text
    entry["folds"]["B"], entry["gains"]["B"] = True, 1.125
    assert "Where `auto` folds, lowest separate / folded time: 1.12" in bench.markdown(result)


def test_compared_products_are_one_function_and_train_what_their_names_say():
    layers, x = bench._layers(64, 4, "fp32", torch.device("cpu"), "products"), torch.randn(5, 64)
    for name, layer in layers.items():
        if ", " in name:
            torch.testing.assert_close(layer(x), layers["naive"](x))
            trained = {key for key, parameter in layer.named_parameters() if parameter.requires_grad}
            assert trained == ({"lora_B"} if name.startswith("B") else {"lora_A", "lora_B"}), name
            assert layer.folds(1) is name.endswith("folded")


def test_all_low_rank_layers_are_one_function():
    layers = bench._layers(64, 4, "fp32", torch.device("cpu"))
    x = torch.randn(5, 64)
    linear = layers["peft"]
    adapters = [linear.lora_A["default"].weight, linear.lora_B["default"].weight]
    with torch.no_grad():
        for mine, its in zip((layers["dense"].lora_A, layers["dense"].lora_B), adapters, strict=True):
            its.copy_(mine)
    assert {name for name, p in linear.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    expected = layers["naive"](x)
    for name, rtol in (
        ("peft", 1e-5),
        ("dense", 1e-5),
        ("bf16", 0.01),
        ("int8", 0.02),
        ("fp8", 0.05),
        ("nf4", 0.15),
        ("nf4_double", 0.15),
    ):
        got = layers[name](x)
        assert (got - expected).norm() <= rtol * expected.norm(), name
    assert (layers["full"](x) - expected).norm() > 0.1 * expected.norm()  # without the update


@pytest.mark.parametrize(("hidden", "r"), [(512, 128), (64, 4)])
def test_the_ceiling_is_the_quotient_of_the_flops(hidden, r):
    layers = bench._layers(hidden, r, "fp32", torch.device("cpu"))
    flops = {}
    for name in ("full", "naive"):
        x = torch.randn(2, hidden, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layers[name](x).sum().backward()
        flops[name] = counter.get_total_flops()
    assert bench.ceiling(hidden, hidden, r, rows=2) == pytest.approx(flops["full"] / flops["naive"])


def test_layers_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    order, values = [], iter([100.0, 200.0, 4.0, 2.0, 8.0, 2.0, 6.0, 1.0])

    def timed(call):
        order.append(call.args[0])
        assert [gradient is not None for gradient in call()] == [True, True]
        return next(values)

    monkeypatch.setattr(layer_timing, "_timed_on_cpu", timed)
    layers = {name: torch.nn.Linear(4, 4, bias=False) for name in ("full", "naive")}
    times = layer_timing.times_in_turns(layers, 4, 2, torch.float32, torch.device("cpu"), 3)
    assert order == [*layers.values()] * 4
    assert times == {"full": [4.0, 8.0, 6.0], "naive": [2.0, 2.0, 1.0]}
    assert layer_timing.speeds(times, "full") == {"full": 1.0, "naive": 4.0}


def test_cuda_is_timed_by_events_on_the_stream(monkeypatch):
    events, calls = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append(len(calls))

        def synchronize(self):
            events.append("synchronized")

        def elapsed_time(self, end):
            return 30.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert layer_timing._timed_on_cuda(lambda: calls.append(1), num_calls=3) == 10.0
    assert events == [0, 3, "synchronized"]


def test_what_is_missing_or_odd_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device: there is no cuda here; use --device cpu"):
        bench.run(tiny_arguments("--device", "cuda"))
    with pytest.raises(ValueError, match=r"--hidden: \[64, 100\] are not all multiples of 16"):
        bench.run(tiny_arguments("--hidden", "64", "100"))
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r'pip install "\.\[peft\]"'):
            bench.run(tiny_arguments())
    monkeypatch.setattr(NF4, "unavailable", lambda self: "needs bitsandbytes")
    names = bench._layers(64, 4, "fp32", torch.device("cpu")).keys()
    assert "int8" in names and "nf4" not in names and "nf4_double" not in names

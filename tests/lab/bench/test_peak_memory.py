"""`bench memory`: the meter, the table, and small engines against the itemised account of planning."""

import argparse
from pathlib import Path

import pytest
import torch

from relora_ds.lab.bench import baselines, peak_memory
from relora_ds.planning.cost import cost
from relora_ds.planning.device_memory import DEVICE, KEPT, total
from relora_ds.planning.network import network_of
from relora_ds.training.phases import phases_of
from relora_ds.training.preflight import resolve


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    peak_memory.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="Linux's /proc")
def test_the_meter_sees_a_peak_that_is_over_and_what_is_kept():
    meter = peak_memory._Meter(None)
    size = 2**28  # what other tests leave comes and goes, and is little beside it
    kept = torch.ones(size // 4)
    forgotten = torch.ones(size)
    del forgotten
    meter.reset()
    gone = torch.ones(size // 2)
    del gone
    peak, reserved = meter.peak()
    assert reserved is None and kept.nbytes == size
    assert meter.now() == pytest.approx(size, rel=0.05)
    assert peak == pytest.approx(3 * size, rel=0.05)


def test_the_table_compares_with_full_rank_under_the_same_checkpointing():
    def row(variant, mode, peak, host=0):
        return {
            "variant": variant,
            "checkpointing": mode,
            "trainable": 1_000_000,
            "kept_bytes": 5 * 10**8,
            "peak_bytes": peak,
            "reserved_bytes": 2 * peak,
            "host_bytes": host,
        }

    result = {
        "preset": "p",
        "vocab_size": 1000,
        "r": 4,
        "micro_batch_size": 1,
        "seq_len": 8,
        "precision": "bf16",
        "threads": 2,
        "device": "cuda",
        "rows": [
            row("full rank", "none", 4 * 10**9),
            row("ours, nf4", "none", 10**9, 10**9),
            row("full rank", "full", 2 * 10**9),
            row("ours, nf4", "full", 10**9),
            row("CoLA-M", "low_rank", 10**9),  # which full rank does not have
        ],
    }
    lines = [line for line in peak_memory.markdown(result).splitlines() if line.startswith(("| ours", "| CoLA"))]
    assert lines == [
        "| ours, nf4 | none | 1.0M | 0.50 GB | 1.00 GB | 2.00 GB | 25 % | 1.00 GB |",
        "| ours, nf4 | full | 1.0M | 0.50 GB | 1.00 GB | 2.00 GB | 50 % | – |",
        "| CoLA-M | low_rank | 1.0M | 0.50 GB | 1.00 GB | 2.00 GB | 25 % | – |",
    ]


@pytest.mark.slow
def test_engines_hold_what_the_account_says():
    result = peak_memory.run(
        arguments(
            "--device",
            "cpu",
            "--preset",
            "llama_20m",
            "--r",
            "8",
            "--vocab-size",
            "1000",
            "--micro-batch-size",
            "8",
            "--threads",
            "1",
            "--checkpointing",
            "none",
            "full",
            "--variants",
            "full rank",
            "ours, nf4",
            "PEFT, same modules train",
        )
    )
    rows = {(row["variant"], row["checkpointing"]): row for row in result["rows"]}
    for (variant, checkpointing), row in rows.items():
        assert row["kept_bytes"] < row["peak_bytes"], variant
        if checkpointing == "full":
            assert row["peak_bytes"] < 0.6 * rows[variant, "none"]["peak_bytes"], variant
        elif not variant.startswith("PEFT"):
            spec = baselines.Spec(variant, "llama_20m", 8, 1000, 8, 256, "fp32")
            resolved = resolve("tiny", spec.overrides(1), 1, to_run=False)
            (phase,) = phases_of(resolved.recipe)
            items = cost(resolved, phase.method, network_of(resolved.recipe)[0]).items
            assert row["kept_bytes"] == pytest.approx(total(items, DEVICE, KEPT), rel=0.1), variant
    full, ours, peft = (rows[variant, "full"] for variant in ("full rank", "ours, nf4", "PEFT, same modules train"))
    assert ours["trainable"] == peft["trainable"] < full["trainable"]
    assert ours["peak_bytes"] < peft["peak_bytes"] < full["peak_bytes"]
    assert ours["host_bytes"] > 4 * 3_000_000 and full["host_bytes"] == peft["host_bytes"] == 0


def test_an_option_for_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device: PyTorch sees no CUDA device here; use --device cpu"):
        peak_memory.run(arguments("--device", "cuda"))


def test_a_variant_that_names_its_checkpointing_is_measured_once(monkeypatch):
    good = {"trainable": 1e6, "kept_bytes": 1e9, "peak_bytes": 2e9, "reserved_bytes": 0, "host_bytes": 0}
    monkeypatch.setattr(peak_memory, "_in_a_process", lambda spec, device: good)
    result = peak_memory.run(
        arguments("--device", "cpu", "--preset", "tiny", "--r", "8", "--variants", "full rank", "CoLA", "CoLA-M")
    )
    assert [(row["variant"], row["checkpointing"]) for row in result["rows"]] == [
        ("full rank", "none"),
        ("CoLA", "none"),
        ("CoLA-M", "low_rank"),
        ("full rank", "full"),
        ("CoLA", "full"),
    ]


def test_a_process_that_dies_is_a_row_with_its_last_line_and_the_others_are_measured(monkeypatch):
    good = {"trainable": 1e6, "kept_bytes": 1e9, "peak_bytes": 2e9, "reserved_bytes": 0, "host_bytes": 0}
    real = peak_memory._in_a_process
    monkeypatch.setattr(peak_memory, "require", lambda specs: None)  # it would find the mistake before
    monkeypatch.setattr(
        peak_memory, "_in_a_process", lambda spec, device: good if spec.variant == "ours, nf4" else real(spec, device)
    )
    result = peak_memory.run(
        arguments(
            "--device", "cpu", "--preset", "llama_1x", "--checkpointing", "none", "--variants", "full rank", "ours, nf4"
        )
    )
    error, row = result["rows"]
    assert error["error"].startswith("exit code 1; ") and "model.preset: 'llama_1x'" in error["error"]
    assert row["peak_bytes"] == 2e9
    assert "| full rank | none | failed |" in peak_memory.markdown(result)

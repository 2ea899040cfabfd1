"""docs/quantization.md says what was measured, and what was measured is what it promises."""

import json
import re

import pytest
import torch

from relora_ds.lowrank.formats import format_named
from tests.bench import report

TEXT = report.DOCUMENT.read_text(encoding="utf-8")


def test_every_table_is_that_of_its_measurement():
    assert report.filled(TEXT) == TEXT, "docs/quantization.md is stale: python -m tests.bench.report"
    shown = {found[1] for found in report.TABLE.finditer(TEXT)}
    assert shown == {path.stem for path in report.MEASUREMENTS.glob("*.json")}


def test_bits_of_a_weight():
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d.]+) \|", TEXT, re.MULTILINE))
    shape = torch.Size([1024, 1024])
    for name, bits in rows.items():
        assert 8 * format_named(name).num_bytes(shape) / shape.numel() == pytest.approx(float(bits), abs=0.006), name
    assert set(rows) == {"bf16", "int8", "fp8", "nf4", "nf4_double"}


def measured(name: str) -> dict:
    return json.loads((report.MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))["result"]


def test_a_quantized_base_learns_as_well():
    result = measured("quality")
    assert result["seeds"] >= 3 and result["restarts"] >= 5
    for name, most in (("int8", 0.5), ("nf4", 2.0)):
        assert all(abs(difference) < most for difference in
                   result["variants"][name]["difference_percent_by_seed"]), name


def test_masters_keep_what_would_be_lost():
    variants = measured("quality_every_format")["variants"]
    for name in ("int8", "nf4"):
        assert variants[name]["merge_loss_total"] < 0.7 * variants[f"{name}, no master"]["merge_loss_total"], name


def test_the_fused_layer_is_near_its_ceiling_and_no_format_slower_than_others():
    for entry in measured("layer")["measured"]:
        assert entry["over_full"]["dense"] >= 0.85 * entry["ceiling"]
        for name in entry["ms"].keys() - {"full", "naive", "peft"}:
            assert min(entry["over_naive"][name], entry["over_peft"][name]) >= 0.99, (entry["hidden"], entry["r"], name)

"""The pages say what was measured, and what was measured is what they promise."""

import re

import pytest
import torch

from relora_ds.bench.two_hosts import with_predictions
from relora_ds.figures.benchmarks import draw_clusters, draw_two_hosts
from relora_ds.figures.style import LIGHT
from relora_ds.lowrank.formats import format_named
from tests.bench import report

MEASURED = {name: record["result"] for page in report.PAGES for name, record in report.measurements(page).items()}


@pytest.mark.parametrize("page", report.PAGES)
def test_every_table_is_that_of_its_measurement(page):
    text = (report.DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert report.filled(page) == text, f"docs/{page}.md is stale: python -m tests.bench.report"
    assert {found[1] for found in report.TABLE.finditer(text)} == set(report.measurements(page))


def test_bits_of_a_weight():
    text = (report.DOCS / "quantization.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d.]+) \|", text, re.MULTILINE))
    shape = torch.Size([1024, 1024])
    for name, bits in rows.items():
        assert 8 * format_named(name).num_bytes(shape) / shape.numel() == pytest.approx(float(bits), abs=0.006), name
    assert set(rows) == {"bf16", "int8", "fp8", "nf4", "nf4_double"}


def test_a_quantized_base_learns_as_well():
    result = MEASURED["quality"]
    assert result["seeds"] >= 3 and result["restarts"] >= 5
    for name, most in (("int8", 0.5), ("nf4", 2.0)):
        assert all(abs(difference) < most for difference in
                   result["variants"][name]["difference_percent_by_seed"]), name


def test_masters_keep_what_would_be_lost():
    variants = MEASURED["quality_every_format"]["variants"]
    for name in ("int8", "nf4"):
        assert variants[name]["merge_loss_total"] < 0.7 * variants[f"{name}, no master"]["merge_loss_total"], name


def test_the_fused_layer_is_near_its_ceiling_and_no_format_slower_than_others():
    for entry in MEASURED["layer"]["measured"]:
        assert entry["over_full"]["dense"] >= 0.85 * entry["ceiling"]
        for name in entry["ms"].keys() - {"full", "naive", "peft"}:
            assert min(entry["over_naive"][name], entry["over_peft"][name]) >= 0.99, (entry["hidden"], entry["r"], name)


def test_the_figures_show_every_contender_and_preset():
    hosts = draw_two_hosts(with_predictions(MEASURED["two_hosts_1gbit"]), LIGHT)
    names = {row["variant"] for row in MEASURED["two_hosts_1gbit"]["rows"]}
    assert {label.get_text() for label in hosts.axes[0].get_yticklabels()} == names
    clusters = draw_clusters(MEASURED["clusters"], LIGHT)
    assert [axes.get_title(loc="left") or axes.get_title() for axes in clusters.axes] == list(
        dict.fromkeys(row["preset"] for row in MEASURED["clusters"]["rows"]))

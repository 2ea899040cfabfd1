"""The pages say what was measured, and what was measured is what they promise."""

import argparse
import json
import re
import statistics

import pytest
import torch

from relora_ds.lab.bench import gpu_check
from relora_ds.lab.bench.baselines import FULL, TWINS
from relora_ds.lab.bench.throughput import speed_of
from relora_ds.lab.bench.two_hosts import with_predictions
from relora_ds.lab.figures.plot_benchmarks import draw_clusters, draw_two_hosts
from relora_ds.lab.figures.style import LIGHT
from relora_ds.lowrank.formats import format_named
from tests.lab.bench import report
from tests.lab.bench.test_gpu_check import RECORD

MEASURED = {name: record["result"] for page in report.PAGES for name, record in report.measurements(page).items()}


@pytest.mark.parametrize("page", report.PAGES)
def test_every_table_is_that_of_its_measurement(page):
    text = (report.DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert report.filled(page) == text, f"docs/results/{page}.md is stale: python -m tests.lab.bench.report"
    of_many = {"widths"} if page == "benchmarks" else set()
    assert {found[1] for found in report.TABLE.finditer(text)} == set(report.measurements(page)) | of_many


def test_the_page_of_gpus_has_every_card_that_was_checked():
    text = (report.DOCS / "gpu.md").read_text(encoding="utf-8")
    assert report.filled_cards() == text, "docs/results/gpu.md is stale: python -m tests.lab.bench.report"
    parser = argparse.ArgumentParser()
    gpu_check.add_arguments(parser)
    assert f"{parser.get_default('minutes')} minutes at most" in text
    assert list(re.findall(r"^\| ([\w .]+) \|", text[text.index("| part | what |") :], re.MULTILINE))[1:7] == list(
        gpu_check.SHARES
    )


def test_the_readme_has_what_was_measured():
    text = report.README.read_text(encoding="utf-8")
    assert {found[1] for found in report.TABLE.finditer(text)} == {"costs"}
    assert report.filled_readme() == text, "README.md is stale: python -m tests.lab.bench.report"


def test_a_card_has_a_line_and_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DOCS", tmp_path)
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "h200.json").write_text(json.dumps(RECORD))
    (tmp_path / "gpu.md").write_text("Cards:\n\n<!-- cards -->\n<!-- end of cards -->\n")
    text = report.filled_cards()
    assert "| NVIDIA H200 | 1 | 1 | 1 |" in text and "### h200" in text and "| ours, dense | llama_350m |" in text


def test_bits_and_rounding_errors_of_a_weight():
    text = (report.DOCS / "quantization.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d.]+) \| ([\d.]+) % \|", text, re.MULTILINE)
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for name, bits, error in rows:
        form = format_named(name)
        assert 8 * form.num_bytes(weight.shape) / weight.numel() == pytest.approx(float(bits), abs=0.006), name
        stored = form.dequantize(form.quantize(weight, torch.float32), weight.shape, torch.float32)
        found = 100 * float((stored - weight).norm() / weight.norm())
        assert f"{found:.{len(error.partition('.')[2])}f}" == error, name
    assert {name for name, *_ in rows} == {"bf16", "int8", "fp8", "nf4", "nf4_double"}


def test_a_quantized_base_learns_as_well():
    result = MEASURED["quality"]
    assert result["seeds"] >= 3 and result["restarts"] >= 5
    for name, most in (("int8", 0.5), ("nf4", 2.0)):
        assert all(abs(difference) < most for difference in result["variants"][name]["difference_percent_by_seed"]), (
            name
        )


def test_masters_keep_what_would_be_lost():
    variants = MEASURED["quality_every_format"]["variants"]
    for name in ("int8", "nf4"):
        assert variants[name]["merge_loss_total"] < 0.7 * variants[f"{name}, no master"]["merge_loss_total"], name


def test_the_fused_layer_is_near_its_ceiling_and_no_format_slower_than_others():
    for entry in MEASURED["layer"]["measured"]:
        assert entry["over_full"]["dense"] >= 0.85 * entry["ceiling"]
        for name in entry["ms"].keys() - {"full", "naive", "peft"}:
            assert min(entry["over_naive"][name], entry["over_peft"][name]) >= 0.99, (entry["hidden"], entry["r"], name)


def test_folding_is_never_slower_where_the_rule_folds_and_one_sided_layers_are_faster_than_full_rank():
    measured = MEASURED["layer_products"]["measured"]
    assert {(entry["hidden"], entry["hidden"] // entry["r"]) for entry in measured} == {
        (hidden, part) for hidden in (512, 1024, 2048) for part in (16, 4)
    }
    for entry in measured:
        assert all(gain >= 1 for trains, gain in entry["gains"].items() if entry["folds"][trains])
        assert entry["over_full"]["B, folded"] > 1
        assert (entry["over_full"]["both, folded"] > 1) is (entry["hidden"] // entry["r"] == 16)


def test_folded_steps_are_faster_than_separate_ones_and_than_full_rank():
    rows = MEASURED["step_60m_products"]["rows"]
    speed = {row["variant"]: speed_of(row, rows) for row in rows}
    for kind in ("ours", "ours, one-sided"):
        assert speed[f"{kind}, folded"] > max(1, speed[f"{kind}, separate"])


def test_steps_that_auto_folds_are_not_slower_than_separate_ones():
    folded = 0
    for record in report.measurements("benchmarks/widths").values():
        rows = {row["variant"]: row for row in record["result"]["rows"]}
        for separate, auto in (
            ("ours, separate", "ours, dense"),
            ("ours, one-sided, separate", "ours, one-sided, random"),
        ):
            if rows[auto]["flops_per_token"] < rows[separate]["flops_per_token"]:
                steps = zip(rows[separate]["steps_s"], rows[auto]["steps_s"], strict=True)
                assert statistics.median(slow / fast for slow, fast in steps) >= 1, record["result"]["preset"]
                folded += 1
    assert folded >= 8


STEPS = [name for name in MEASURED if name.startswith("step_")]


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_near_their_ceiling_and_no_slower_than_pefts(name):
    rows = {(row["variant"], row["micro_batch_size"]): row for row in MEASURED[name]["rows"]}
    full = {size: row for (variant, size), row in rows.items() if variant == FULL}
    for (variant, size), row in rows.items():
        if peft := next((peft for peft, ours in TWINS.items() if ours == variant), None):
            ceiling = full[size]["flops_per_token"] / row["flops_per_token"]
            assert speed_of(row, list(rows.values())) >= 0.85 * ceiling, (variant, size)
            quotients = [
                theirs / ours for theirs, ours in zip(rows[peft, size]["steps_s"], row["steps_s"], strict=True)
            ]  # of the same turn
            assert statistics.median(quotients) >= 0.98, (variant, size)
    assert {(512, 32), (512, 128), (2048, 32), (2048, 128)} <= {
        ({"llama_60m": 512, "wide_2": 2048}.get(MEASURED[one]["preset"].rpartition("/")[2]), MEASURED[one]["r"])
        for one in STEPS
    }


def test_a_restart_is_shorter_than_a_step_of_the_papers_batch():
    assert all(statistics.median(row["pauses_s"]) < row["step_s"] for row in MEASURED["restart"]["rows"])


CABLES = ("two_hosts_10gbit", "two_hosts_1gbit", "two_hosts_100mbit", "two_hosts_stage_0", "two_hosts_1gbit_peft")


@pytest.mark.parametrize("name", CABLES)
def test_the_kernel_sent_what_was_counted(name):
    """And headers: of every frame at 100 Mbit/s, of up to 64 KB at once where TCP may send faster."""
    headers = 1514 / 1448 if name == "two_hosts_100mbit" else 1.03
    for row in MEASURED[name]["rows"]:
        assert 1 <= row["kernel_tx_bytes"] / row["wire"] <= headers, (row["shape"], row["variant"])


@pytest.mark.parametrize("name", ["two_hosts_1gbit", "two_hosts_100mbit"])
def test_steps_are_predicted_within_15_percent_where_the_cable_is_what_they_wait_for(name):
    """At 10 Gbit/s it is not: gloo's copies take longer than the cable."""
    for row in with_predictions(MEASURED[name])["rows"]:
        assert abs(row["predicted_s"] / row["step_s"] - 1) <= 0.15, (row["shape"], row["variant"])


@pytest.mark.parametrize("name", ["two_hosts_1gbit", "two_hosts_100mbit"])
def test_time_follows_bytes(name):
    """Communication is shorter by 0.9 of the bytes' ratio at least, and the step by 0.9 of what the rate allows."""
    rows = with_predictions(MEASURED[name])["rows"]
    full = {row["shape"]: row for row in rows if row["variant"] == FULL}
    for row in rows:
        base = full[row["shape"]]
        if row["variant"].startswith("ours"):
            ratios = {part: base[part] / row[part] for part in ("wire", "communication_s", "step_s", "at_full_rate_s")}
            assert ratios["communication_s"] >= 0.9 * ratios["wire"], row["variant"]
            assert ratios["step_s"] >= 0.9 * ratios["at_full_rate_s"], row["variant"]


def test_across_a_cable_ours_is_no_slower_than_pefts():
    steps = {row["variant"]: row["step_s"] for row in MEASURED["two_hosts_1gbit_peft"]["rows"]}
    assert all(steps[ours] <= steps[peft] for peft, ours in TWINS.items())


def test_no_cable_is_too_fast_for_low_rank():
    rows = MEASURED["two_hosts_10gbit"]["rows"]
    full = {row["shape"]: row["step_s"] for row in rows if row["variant"] == FULL}
    assert all(row["step_s"] <= full[row["shape"]] for row in rows)
    (best,) = (
        row
        for row in MEASURED["two_hosts_1gbit"]["rows"]
        if (row["shape"], row["variant"]) == ("wide_4", "ours, LoRA alone")
    )
    (base,) = (row for row in MEASURED["two_hosts_1gbit"]["rows"] if (row["shape"], row["variant"]) == ("wide_4", FULL))
    assert best["tokens_per_s"] >= 4 * base["tokens_per_s"]


def test_the_figures_show_every_variant_and_preset():
    hosts = draw_two_hosts(with_predictions(MEASURED["two_hosts_1gbit"]), LIGHT)
    names = {row["variant"] for row in MEASURED["two_hosts_1gbit"]["rows"]}
    assert {label.get_text() for label in hosts.axes[0].get_yticklabels()} == names
    clusters = draw_clusters(MEASURED["clusters"], LIGHT)
    assert [axes.get_title(loc="left") or axes.get_title() for axes in clusters.axes] == list(
        dict.fromkeys(row["preset"] for row in MEASURED["clusters"]["rows"])
    )

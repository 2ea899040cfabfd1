"""docs/results/training.md and README.md say what was measured."""

import statistics

import pytest

from relora_ds.lab.bench.island_times import ISLANDS, PARALLEL
from tests.lab.experiments import figures, link_times, results


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_runs(page):
    text = page.read_text(encoding="utf-8")
    assert results.TABLE.search(text)
    assert results.filled(text) == text, f"{page.name} is stale: python -m tests.lab.experiments.results"
    assert "Not all have the same text" not in text, "rows of one table were trained on different texts"


@pytest.mark.parametrize(("scale", "suite", "figure"), figures.shown())
def test_figures_are_those_of_the_runs(scale, suite, figure):
    file = figures.file_of(scale, suite, figure)
    stale = f"{file} is stale: python -m tests.lab.experiments.figures"
    assert figures.digest_in(file) == figures.digest_of(scale, suite), stale


@pytest.fixture(scope="module")
def main():
    _, _, rows = results.measured("tiny", "main")
    return {row.row.name: row for row in rows}


def test_the_headline_rows_have_three_seeds(main):
    assert {name: len(row.results) for name, row in main.items()} == dict.fromkeys(
        ["full rank", "Control", "LoRA", "LoRA, warm start", "ReLoRA", "GaLore, residual"], 3
    )


@pytest.mark.parametrize("other", ["LoRA", "LoRA, warm start", "Control"])
def test_relora_is_better_by_more_than_the_spread(main, other):
    """Seed by seed: initial weights and data are the same then."""
    gaps = main["ReLoRA"].differences(main[other])
    assert max(gaps) < 0 and -statistics.mean(gaps) > statistics.stdev(gaps)


def test_the_rank_of_the_updates(main):
    for row in main.values():
        ranks = [one["spectrum"]["numerical_rank"] for one in row.results if one.get("spectrum")]
        if row.row.name == "ReLoRA":
            assert min(ranks) >= 2 * row.results[0]["r"]
        if row.row.name == "LoRA, warm start":
            assert max(ranks) <= row.results[0]["r"]


def losses(suite: str) -> dict[str, float]:
    return {row.row.name: row.losses[0] for row in results.measured("tiny", suite)[2]}


def test_the_ablation_has_the_papers_order():
    """But for resets without a ramp, which diverged there."""
    found = losses("ablation")
    alone = (found["restarts"], found["restarts, jagged"])
    assert found["LoRA, random W"] - min(alone) < 0.01  # as good as nothing
    order = [
        min(alone),
        found["restarts, reset, jagged"],
        found["restarts, reset, jagged, warm start"],
        found["ReLoRA"],
    ]
    assert order == sorted(order, reverse=True)


@pytest.fixture(scope="module")
def horizon():
    """row name, number of steps -> the row."""
    return {tuple(row.row.name.split(", steps ")): row for row in results.measured("tiny", "horizon")[2]}


def leads(horizon, other: str) -> list[tuple[float, ...]]:
    """By how much ReLoRA is ahead, by the number of steps and by seed."""
    found = [
        tuple(-gap for gap in horizon["ReLoRA", steps].differences(horizon[other, steps]))
        for steps in ("3500", "5000", "8000", "16000")
    ]
    assert all(len(by_seed) == 3 for by_seed in found)
    return found


def test_the_lead_over_lora_grows_with_the_number_of_steps(horizon):
    found = leads(horizon, "LoRA, warm start")
    assert max(found[0]) < 0 < min(found[1]), "the lines cross with every seed"
    assert all(list(of_seed) == sorted(of_seed) for of_seed in zip(*found, strict=True))


def test_in_long_runs_the_lead_is_larger_than_the_spread_of_the_losses(horizon):
    relora, lora = horizon["ReLoRA", "16000"], horizon["LoRA, warm start", "16000"]
    assert -statistics.mean(relora.differences(lora)) > max(map(statistics.stdev, (relora.losses, lora.losses)))


def test_a_warm_start_that_grows_with_the_run_keeps_the_control_behind(horizon):
    control, full = horizon["Control", "16000"], horizon["full rank", "16000"]
    relora, lora = (horizon[f"{name} in the longest run, warm start 4000",] for name in ("ReLoRA", "LoRA"))
    shorter, base = horizon["ReLoRA", "8000"], horizon["LoRA, warm start", "8000"]
    assert max(relora.differences(control)) < statistics.mean(shorter.differences(horizon["Control", "8000"])) < 0
    assert max(relora.differences(lora)) < 0
    for row, before in ((relora, shorter), (lora, base)):
        nearer, far = row.differences(full), before.differences(horizon["full rank", "8000"])
        assert statistics.mean(nearer) < statistics.mean(far)


def test_one_warm_start_has_both_leads_larger_than_the_spread_of_the_losses(horizon):
    relora, lora = (horizon[f"{name} in the longest run, warm start 3000",] for name in ("ReLoRA", "LoRA"))
    for other in (lora, horizon["Control", "16000"]):
        assert -statistics.mean(relora.differences(other)) > max(map(statistics.stdev, (relora.losses, other.losses)))


@pytest.mark.parametrize("other", ["Control", "full rank"])
def test_what_trains_all_the_time_gains_on_it(horizon, other):
    found = [statistics.mean(by_seed) for by_seed in leads(horizon, other)]
    assert found == sorted(found, reverse=True)


def test_galore_is_ahead_of_full_rank_at_first_and_ends_behind():
    found = {row.row.name: row.results[0] for row in results.measured("tiny", "galore")[2]}
    full, galore = found["full rank"], found["exact, carried, r 16"]
    gaps = [ours - theirs for (_, ours), (_, theirs) in zip(galore["train_curve"], full["train_curve"], strict=True)]
    assert max(gaps[:10]) < 0 and min(gaps[25:]) > 0
    assert full["val_loss"] < min(found[f"{name}, r 16"]["val_loss"] for name in ("ReLoRA", "LoRA, warm start"))
    assert galore["val_loss"] > max(found[f"{name}, r 16"]["val_loss"] for name in ("ReLoRA", "LoRA, warm start"))
    assert galore["spectrum"]["numerical_rank"] >= full["spectrum"]["numerical_rank"] - 1


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("full rank", {("full", PARALLEL): (8000, 0)}),
        ("ReLoRA, r 16", {("full", PARALLEL): (2000, 0), ("relora", PARALLEL): (6000, None)}),
        ("full rank, 2 islands, H 200", {("full", ISLANDS): (8000, 40)}),
        ("ReLoRA, 2 islands, H 200", {("full", ISLANDS): (2000, 10), ("relora", ISLANDS): (6000, 30)}),
        ("one-sided, 2 islands, H 1000", {("one-sided", ISLANDS): (8000, 8)}),
    ],
)
def test_the_time_of_a_run_is_that_of_its_steps_and_pauses(name, steps):
    """By hand: 8,000 steps, of which a warm start has 2,000, and what the run itself has counted."""
    (row,) = (row for row in results.measured("tiny", "islands")[2] if row.row.name == name)
    bench = {
        (method, way): {"step_s": 1.0 + number, "exchange_s": None, "restart_s": 1e5 + number}
        for number, (method, way) in enumerate(
            (m, w) for m in ("full", "relora", "one-sided") for w in (PARALLEL, ISLANDS)
        )
    }
    counted = row.results[0]
    assert counted["step"] == 8000
    expected = 0.0
    for key, (taken, pauses) in steps.items():
        pauses = counted["restarts"] if pauses is None else pauses
        expected += taken * bench[key]["step_s"] + pauses * bench[key]["restart_s"]
    assert link_times.seconds_over(counted, bench) == expected
    assert "exchanges" not in counted or counted["exchanges"] == sum(pauses for _, pauses in steps.values())

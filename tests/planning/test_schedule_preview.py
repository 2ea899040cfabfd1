"""The calendar against numbers written down by hand, and against what a run really did."""

import pytest

from relora_ds.config import load_recipe, method_of
from relora_ds.planning.schedule_preview import curve, draw, events, learning_rate, marks
from relora_ds.training.phases import phases_of
from tests.training.runs import lines, run

# 1000 low-rank steps, restarts every 300: N is no multiple of R, and the last cycle has 100 steps.
UNEVEN = [
    "train.steps=1100",
    "warm_start_steps=100",
    "relora.restart_every=300",
    "relora.restart_warmup_steps=10",
    "optim.warmup_steps=50",
    "optim.min_lr_ratio=0.1",
    "optim.lr=1.0",
    "optim.warm_start_lr=0.5",
]


def test_restarts_of_a_run_that_is_no_multiple_of_a_cycle():
    recipe = load_recipe("tiny", UNEVEN)
    warm, low = phases_of(recipe)
    assert warm.restarts == [] and low.restarts == [400, 700, 1000]
    assert [(e.step, e.phase, e.what) for e in events(recipe)] == [
        (0, "warm_start", "warm_start begins"),
        (50, "warm_start", "end of the warm-up"),
        (100, "relora", "relora begins"),
        (150, "relora", "end of the warm-up"),
        (400, "relora", "restart 1"),
        (410, "relora", "end of the re-warm-up"),
        (700, "relora", "restart 2"),
        (710, "relora", "end of the re-warm-up"),
        (1000, "relora", "restart 3"),
        (1010, "relora", "end of the re-warm-up"),
        (1100, "relora", "end of the run"),
    ]


def test_learning_rates_of_the_design():
    recipe = load_recipe("tiny", [*UNEVEN, "train.steps=1000", "warm_start_steps=0", "relora.restart_every=200"])
    (phase,) = phases_of(recipe)
    for step, expected in {
        25: 0.5,
        50: 1,
        199: 0.946469290935,
        200: 0,
        201: 0.093846541643,
        205: 0.469232708215,
        210: 0.938465416431,
        400: 0,
        410: 0.717038762013,
        999: 0.100002460564,
    }.items():
        assert learning_rate(recipe, phase, step) == pytest.approx(expected, abs=1e-11)


def test_wsd_decays_at_the_end_and_not_in_the_warm_start():
    settings = [*UNEVEN, "optim.schedule=wsd", "relora.restart_every=600"]  # 1,000 low-rank steps
    recipe = load_recipe("tiny", settings)
    warm, low = phases_of(recipe)
    assert (low.stop - 100, "relora", "the decay begins") in [(e.step, e.phase, e.what) for e in events(recipe)]
    assert learning_rate(recipe, warm, 99) == 0.5
    assert [learning_rate(recipe, low, step) for step in (999, 1000, 1050)] == pytest.approx([1, 1, 0.55])
    # A warm start that is nearly the whole run: a tenth of the run would begin inside it.
    late = [*settings, "warm_start_steps=1040", "optim.warmup_steps=5", "relora.restart_every=null"]
    warm, low = phases_of(load_recipe("tiny", late))
    assert [learning_rate(recipe, warm, step) for step in (6, 1039)] == [0.5, 0.5]
    assert learning_rate(recipe, low, 1094) == 1 and low.decay_steps == 6
    assert not any(e.what == "the decay begins" for e in events(load_recipe("tiny", UNEVEN)))


def test_methods_without_restarts():
    lora = load_recipe("tiny", ["method=lora"])
    assert not any("restart" in event.what for event in events(lora))
    (full,) = phases_of(load_recipe("tiny", ["method=full"]))
    assert full.restarts == []


def test_what_a_run_logs_is_what_its_calendar_says(tmp_path):
    settings = ["optim.schedule=wsd", "optim.decay_steps=8"]
    run(tmp_path / "run", *settings, world_size=2)
    recipe = load_recipe("tiny", settings)
    phases = {phase.name: phase for phase in phases_of(recipe)}
    logged = lines(tmp_path / "run", "train")
    assert len(logged) == recipe.total_steps
    for line in logged:  # the line of a step holds the learning rate that its update used
        expected = learning_rate(recipe, phases[line["phase"]], line["step"] - 1)
        assert line["lr"] == pytest.approx(expected, rel=1e-9, abs=1e-15), line["step"]
    begun = {event.step for event in events(recipe) if event.what.startswith("restart")}
    assert {line["step"] for line in lines(tmp_path / "run", "restart")} == begun


@pytest.mark.parametrize("steps", [40, 71, 400, 20_001])
def test_the_marks_stand_below_the_columns_of_their_steps(steps):
    recipe = load_recipe(
        "tiny",
        [f"train.steps={steps}", "relora.restart_every=7"]
        if steps < 100
        else [f"train.steps={steps}", f"relora.restart_every={steps // 5}"],
    )
    columns, line = curve(recipe), marks(recipe)
    assert len(columns) == min(72, steps) and len(line) <= len(columns)
    troughs = [i for i, mark in enumerate(line) if mark == "^"]
    assert len(troughs) == method_of(recipe).num_restarts and all(columns[i] == 0 for i in troughs)


def test_the_drawing_is_as_high_as_its_values():
    assert draw([0.0, 0.5, 1.0], height=2) == ["  █", " ██"]
    assert draw([0.0, 0.0]) == ["  "] * 6


def test_a_run_of_very_many_steps_and_restarts_is_drawn_at_once():
    recipe = load_recipe("tiny", ["train.steps=1e9", "relora.restart_every=1e4", "relora.restart_warmup_steps=10"])
    assert method_of(recipe).num_restarts == 99_999
    assert len(events(recipe)) > 99_999 and len(curve(recipe)) == 72

"""The shipped suites: every row at every scale is a recipe that can run, and rows differ in what they say they do."""

import re
from pathlib import Path

import pytest

from relora_ds.config import load_recipe, method_of
from relora_ds.lab.experiments.runs import Run
from relora_ds.lab.experiments.suites import SCALES, read_suite, suite_names


def rows(name: str, scale: str = "tiny") -> dict:
    return {row.name: Run.of(row, 0).recipe for row in read_suite(name, scale).rows}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", suite_names())
def test_every_row_is_a_recipe_of_its_own(name, scale):
    if scale == "mini" and name in ("horizon", "island_choices"):
        with pytest.raises(ValueError, match=f"--scale: {name} has no rows at mini; use tiny or small or paper"):
            read_suite(name, scale)
        return
    suite = read_suite(name, scale)
    runs = [Run.of(row, seed) for row in suite.rows for seed in range(suite.seeds)]
    assert len({row.name for row in suite.rows}) == len(suite.rows)
    compared = {(run.row.value if run.row.axis == "steps" else None, run.tokens) for run in runs}
    assert len(compared) == len(dict(compared)), "rows are compared at equal tokens"
    assert suite.reference is None or suite.reference in {row.name for row in suite.rows}
    names = [run.name for run in runs]
    # ReLoRA's own setting may be one of a sweep's values.
    assert len(set(names)) >= len(names) - sum(row.axis is not None for row in suite.rows) * suite.seeds
    assert len(set(names)) > len(names) / 2


def test_the_script_of_the_experiments_runs_every_suite():
    script = (Path(__file__).parents[3] / "launch_scripts/experiments.sh").read_text(encoding="utf-8")
    every, mini = (named.split() for named in re.findall(r'^ *all="([a-z_ ]+)"', script, re.MULTILINE))
    assert sorted(every) == suite_names()
    assert all(read_suite(name, "mini").rows for name in mini)
    assert re.search(r"^prepare_environment .*\bislands\b", script, re.MULTILINE)


def test_the_suites_that_the_paper_asks_for():
    assert {"main", "ablation", "reset", "rank", "precision", "lr"} <= set(suite_names())


@pytest.mark.parametrize("scale", SCALES)
def test_lora_on_the_same_warm_start_differs_from_relora_in_the_restarts_alone(scale):
    found = rows("main", scale)
    relora, lora = found["ReLoRA"], found["LoRA, warm start"]
    assert method_of(relora).num_restarts >= 2 and method_of(lora).num_restarts == 0
    assert method_of(lora).full_rank_steps == method_of(relora).full_rank_steps > 0
    assert (lora.relora.r, lora.relora.lora_alpha, lora.optim) == (
        relora.relora.r,
        relora.relora.lora_alpha,
        relora.optim,
    )
    assert relora.optim.warm_start_lr == found["full rank"].optim.lr
    full = found["full rank"]  # its first steps are the warm start, so that its update is measured from there
    assert full.optim.warmup_steps == (relora.optim.warm_start_warmup_steps or relora.optim.warmup_steps)


def test_the_ablation_switches_one_part_on_at_a_time():
    found = rows("ablation")
    full, relora = load_recipe("tiny_full"), load_recipe("tiny_relora")
    parts = {
        name: (
            method_of(recipe).num_restarts > 0,
            recipe.relora.optimizer_reset != "none",
            recipe.relora.restart_warmup_steps > 0,
            method_of(recipe).full_rank_steps > 0,
            recipe.optim.lr > full.optim.lr,
        )
        for name, recipe in found.items()
    }
    assert parts == {
        "LoRA": (False, True, True, False, False),
        "LoRA, random W": (False, True, True, False, False),
        "restarts": (True, False, False, False, False),
        "restarts, reset": (True, True, False, False, False),
        "restarts, jagged": (True, False, True, False, False),
        "restarts, reset, jagged": (True, True, True, False, False),
        "warm start": (False, True, True, True, False),
        "restarts, reset, jagged, warm start": (True, True, True, True, False),
        "ReLoRA": (True,) * 5,
    }
    assert found["ReLoRA"].relora == relora.relora
    assert (found["LoRA"].lora.base, found["LoRA, random W"].lora.base) == ("none", "random")


def test_a_run_is_known_by_what_it_computes():
    row = next(row for row in read_suite("main", "tiny").rows if row.name == "ReLoRA")
    name = Run.of(row, 0).name
    watched = ["log.every=3", "checkpoint.every=7", "run_dir=/elsewhere", "eval.every=50", "compile=true"]
    assert Run.of(row, 0, watched).name == name
    assert Run.of(row, 1).name == name.replace("-seed0", "-seed1")
    others = [
        Run.of(row, 0, [change]).name
        for change in ("optim.lr=1e-3", "relora.r=3", "data.seq_len=64", "train.steps=9000")
    ]
    assert len({name, *others}) == 5
    again = next(row for row in read_suite("ablation", "tiny").rows if row.name == "ReLoRA")
    assert Run.of(again, 0).name == name


def test_bad_names():
    with pytest.raises(ValueError, match="SUITE: nothing is none; there are ablation"):
        read_suite("nothing", "tiny")
    with pytest.raises(ValueError, match="--scale: large is none; there are tiny"):
        read_suite("main", "large")

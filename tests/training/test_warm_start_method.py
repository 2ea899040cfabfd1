"""A warm start by a low-rank method: its own restarts and curve, the hand-over of merged weights, exact resume."""

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.config import load_recipe
from relora_ds.planning.schedule_preview import learning_rate
from relora_ds.training.phases import phases_of
from tests.ranks import ranks
from tests.training.runs import lines, losses, run
from tests.training.test_resume import resume

# Restarts after 6 of 12 steps; what would be a second one is the transition.
SETTINGS = [
    "method=lora",
    "lora.base=warm_start",
    "warm_start_method=relora",
    "warm_start_steps=12",
    "relora.restart_every=6",
    "train.steps=18",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("warm") / "whole"
    return directory, run(directory, *SETTINGS, "checkpoint.every=4", "checkpoint.keep_last=99")


def test_it_restarts_within_the_phase_and_ends_in_a_merge(whole):
    directory, summary = whole
    assert [(p["step"], p["phase"]) for p in lines(directory, "phase")] == [(0, "warm_start"), (12, "lora")]
    assert [(r["step"], r["phase"]) for r in lines(directory, "restart")] == [(6, "warm_start")]
    assert summary["restarts"] == 1
    recipe = load_recipe("tiny", SETTINGS)
    phases = {phase.name: phase for phase in phases_of(recipe)}
    trained = lines(directory, "train")
    assert [line["phase"] for line in trained] == ["warm_start"] * 12 + ["lora"] * 6
    for line in trained:
        assert line["lr"] == pytest.approx(learning_rate(recipe, phases[line["phase"]], line["step"] - 1), rel=1e-9)


def test_no_step_sends_what_full_rank_would(whole):
    directory, summary = whole
    sent = {line["step"]: line["bytes_payload"] for line in lines(directory, "train")}
    assert sent[4] == sent[16] < sent[6], "the same low-rank gradients in both phases; a restart's bytes are counted"
    assert summary["bytes_wire"] < 0.6 * summary["full_rank_bytes_wire"]


@pytest.mark.parametrize("step", [8, 12], ids=["cycle", "transition"])
def test_resume_is_exact(whole, tmp_path, step):
    directory, _ = whole
    run(tmp_path / "r", f"resume={directory}/checkpoints/step_{step:08d}", *SETTINGS)
    then, now = losses(directory), losses(tmp_path / "r")
    assert min(now) == step + 1 and all(now[k] == then[k] for k in now)
    first, second = (load_file(d / "export" / "model.safetensors") for d in (directory, tmp_path / "r"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_method_for_the_rest_of_the_warm_start_is_refused(whole, tmp_path):
    settings = [f"run_dir={tmp_path}/r", *SETTINGS, "warm_start_method=full", "relora.restart_every=null"]
    at = {step: f"resume={whole[0]}/checkpoints/step_{step:08d}" for step in (8, 16)}
    [message] = ranks(1).run(resume, [*settings, at[8]])
    assert "warm_start_method was relora, is full, and the checkpoint is of the warm start" in message
    assert ranks(1).run(resume, [*settings, at[16], "data.seq_len=32"])[0].count("was") == 1  # after it, it is free

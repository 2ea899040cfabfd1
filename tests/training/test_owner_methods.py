"""Runs in which owners update whole weights: exact resume, another stage and world size, and as a warm start."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from relora_ds.config import load_recipe
from relora_ds.models.build import initial_weights
from tests.ranks import ranks
from tests.training.runs import lines, losses, run
from tests.training.test_resume import resume

FIRA = ["method=fira", "fira.update_proj_gap=5", "warm_start_steps=0", "train.steps=12"]
SCALE = ["method=scale", "deepspeed=zero3", "optim.lr=1e-3", "warm_start_steps=0", "train.steps=12"]

SST = ["method=sst", "sst.iteration_steps=5", "relora.r=16", "warm_start_steps=0", "train.steps=12"]


def exported(directory):
    return load_file(directory / "export" / "model.safetensors")


@pytest.mark.parametrize(
    "settings", [FIRA, pytest.param(SCALE, marks=pytest.mark.slow), SST], ids=["fira", "scale", "sst"]
)
def test_resume_is_exact_and_on_other_ranks_near(settings, tmp_path):
    """After step 8 Fira is inside of an interval, and SST inside of an iteration."""
    whole = tmp_path / "whole"
    run(whole, *settings, "checkpoint.every=8", "checkpoint.keep_last=9")
    again, elsewhere = tmp_path / "again", tmp_path / "elsewhere"
    checkpoint = f"resume={whole}/checkpoints/step_00000008"
    run(again, checkpoint, *settings)
    run(elsewhere, checkpoint, *settings, "deepspeed=zero2", world_size=1)
    then, now, near = losses(whole), losses(again), losses(elsewhere)
    assert min(now) == 9 and all(now[step] == then[step] for step in now)
    assert all(torch.equal(exported(whole)[name], value) for name, value in exported(again).items())
    assert all(near[step] == pytest.approx(then[step], rel=1e-5) for step in near)


def test_embedding_and_head_of_scale_are_trained_and_exported(tmp_path):
    run(tmp_path, *SCALE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    recipe = load_recipe("tiny", SCALE)
    first = initial_weights(model.config, recipe.model, recipe.seed)
    moved = [name for name, value in exported(tmp_path).items() if not torch.equal(value, first.read(name))]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"} <= set(moved)
    assert losses(tmp_path)[12] < losses(tmp_path)[1]


def test_a_warm_start_without_adams_moments_of_every_weight(tmp_path):
    settings = ["method=relora", "warm_start_method=muon", "warm_start_steps=8", "relora.restart_every=6"]
    run(tmp_path, *settings, "train.steps=20")
    assert [(line["step"], line["phase"]) for line in lines(tmp_path, "phase")] == [(0, "warm_start"), (8, "relora")]
    assert [line["step"] for line in lines(tmp_path, "restart")] == [14]


@pytest.mark.parametrize("frozen", [[], pytest.param(["deepspeed=zero3", "precision=bf16"], marks=pytest.mark.slow)])
def test_a_warm_start_of_singular_vectors_hands_their_product_over_and_resumes(frozen, tmp_path):
    """From the middle of an iteration, and from the transition, where the next phase has no factors of W."""
    settings = ["method=relora", "warm_start_method=sst", "warm_start_steps=8", "relora.restart_every=6", *frozen]
    settings += ["sst.iteration_steps=3", "sst.iteration_warmup_steps=1", "relora.r=16", "train.steps=16"]
    whole = tmp_path / "whole"
    run(whole, *settings, "checkpoint.every=4", "checkpoint.keep_last=9")
    assert [(line["step"], line["phase"]) for line in lines(whole, "phase")] == [(0, "warm_start"), (8, "relora")]
    then = losses(whole)
    assert then[8] < then[1] - 0.1 and then[9] == pytest.approx(then[8], rel=0.05)
    for step in (4, 8):
        again = tmp_path / str(step)
        run(again, f"resume={whole}/checkpoints/step_{step:08d}", *settings)
        now = losses(again)
        assert min(now) == step + 1 and all(now[each] == then[each] for each in now)
        assert all(torch.equal(exported(whole)[name], value) for name, value in exported(again).items())


def test_another_rule_is_no_resume(tmp_path):
    run(tmp_path / "run", *FIRA, "train.steps=4", "optim.warmup_steps=1")
    checkpoint = f"resume={tmp_path / 'run'}/checkpoints/step_00000004"
    [said] = ranks(1).run(resume, [f"run_dir={tmp_path / 'r'}", *FIRA, "fira.alpha=0.5", checkpoint])
    assert "fira.alpha was 0.25, is 0.5" in said

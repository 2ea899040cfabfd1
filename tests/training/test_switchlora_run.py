"""Runs that switch vectors: exact resume within a freeze, another stage and world size, and an export of the sum."""

import pytest
import torch

from tests.training.runs import losses, run
from tests.training.test_owner_methods import exported

SETTINGS = ["method=switchlora", "warm_start_steps=0", "train.steps=12", "relora.restart_every=null"]
SETTINGS += ["switchlora.interval=4", "switchlora.ratio=0.9", "switchlora.freeze_steps=3", "optim.lr=1e-3"]


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_is_exact_and_on_other_ranks_near(stage, tmp_path):
    settings = [*SETTINGS, f"deepspeed=zero{stage}"]
    whole, again, elsewhere = tmp_path / "whole", tmp_path / "again", tmp_path / "elsewhere"
    run(whole, *settings, "checkpoint.every=8", "checkpoint.keep_last=9")
    checkpoint = f"resume={whole}/checkpoints/step_00000008"
    run(again, checkpoint, *settings)
    run(elsewhere, checkpoint, *settings, "deepspeed=zero2", world_size=1)
    then, now, near = losses(whole), losses(again), losses(elsewhere)
    assert min(now) == 9 and all(now[step] == then[step] for step in now)
    assert all(torch.equal(exported(whole)[name], value) for name, value in exported(again).items())
    assert all(near[step] == pytest.approx(then[step], rel=1e-5) for step in near)

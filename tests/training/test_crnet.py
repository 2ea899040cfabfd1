"""Runs of `crnet`: from tokens to the export, resumed, and moved to other ranks and stages."""

import json

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.__main__ import main
from tests.training.runs import lines, losses, run, status

SETTINGS = ("method=crnet", "warm_start_steps=0", "crnet.r=8", "train.steps=18", "checkpoint.every=6", "log.every=1")
SETTINGS = (*SETTINGS, "checkpoint.keep_last=9", "optim.max_grad_norm=0.5", "optim.weight_decay=0.01")


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("crnet") / "run"
    run(directory, *SETTINGS, "precision=fp32", "deepspeed=zero1")
    return directory


def test_from_tokens_to_the_export(whole, capsys):
    found, evaluations = losses(whole), lines(whole, "eval")
    assert found[18] < found[1] - 0.3 and evaluations[-1]["step"] == 18
    assert status(whole)["state"] == "done" and not lines(whole, "restart")
    names, summary = weights(whole), json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    assert names["model.layers.1.mlp.up_proj.beta"].shape == (1,) and "model.layers.0.mlp.up_proj.weight" in names
    assert summary["trainable_parameters"] == summary["total_parameters"] == sum(map(torch.numel, names.values()))
    assert (whole / "export" / "relora_crnet.py").is_file()
    capsys.readouterr()
    assert main(["eval", str(whole / "export"), "--json", "--data", str(whole)]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "stage, precision",
    [(1, "fp32"), *(pytest.param(stage, "bf16", marks=pytest.mark.slow) for stage in range(4))],
)
def test_a_resume_is_exact(whole, tmp_path, stage, precision):
    settings = (*SETTINGS, f"precision={precision}", f"deepspeed=zero{stage}")
    if (stage, precision) != (1, "fp32"):
        whole = tmp_path / "whole"
        run(whole, *settings)
    run(tmp_path / "resumed", *settings, f"resume={whole}/checkpoints/step_00000012")
    ours, theirs = losses(tmp_path / "resumed"), losses(whole)
    assert min(ours) == 13 and ours == {step: theirs[step] for step in ours}
    before, after = weights(whole), weights(tmp_path / "resumed")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_ranks_and_another_stage_go_on_with_it(whole, tmp_path):
    changes = ("deepspeed=zero3", f"resume={whole}/checkpoints/step_00000012")
    run(tmp_path / "r", *SETTINGS, "precision=fp32", *changes, world_size=1)
    ours, theirs = losses(tmp_path / "r"), losses(whole)
    assert min(ours) == 13
    assert all(loss == pytest.approx(theirs[step], rel=1e-4) for step, loss in ours.items())


def test_another_rank_of_the_factors_is_another_run(whole, tmp_path):
    with pytest.raises(AssertionError, match="crnet.r was 8, is 4"):
        run(tmp_path / "r", *SETTINGS, "crnet.r=4", f"resume={whole}/checkpoints/step_00000012")

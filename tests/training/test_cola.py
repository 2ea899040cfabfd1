"""Runs of `cola` and `cola_m`: from tokens to the export, resumed, and moved to other ranks and stages."""

import json

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.lab.experiments.update_spectra import measure
from tests.training.runs import lines, losses, run, status

SETTINGS = ("warm_start_steps=0", "cola.r=8", "train.steps=18", "checkpoint.every=6", "checkpoint.keep_last=9")
SETTINGS = (*SETTINGS, "optim.max_grad_norm=0.5", "optim.weight_decay=0.01", "log.every=1")


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cola") / "run"
    run(directory, *SETTINGS, "method=cola", "precision=fp32", "deepspeed=zero1")
    return directory


def test_from_tokens_to_the_export(whole):
    found, evaluations = losses(whole), lines(whole, "eval")
    assert found[18] < found[1] - 0.3 and evaluations[-1]["step"] == 18
    assert status(whole)["state"] == "done" and not lines(whole, "restart")
    names = weights(whole)
    assert "model.layers.0.mlp.gate_proj.A" in names and not [name for name in names if "proj.weight" in name]
    factors = 8 * (4 * (64 + 64) + 3 * (64 + 176))
    summary = json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    assert summary["trainable_parameters"] == summary["total_parameters"] == sum(map(torch.numel, names.values()))
    assert summary["total_parameters"] == 2 * (512 * 64 + factors + 2 * 64) + 64


@pytest.mark.parametrize(
    "stage, precision, method",
    [
        (1, "fp32", "cola"),
        *(pytest.param(stage, "bf16", "cola_m", marks=pytest.mark.slow) for stage in range(4)),
    ],
)
def test_a_resume_is_exact(whole, tmp_path, stage, precision, method):
    settings = (*SETTINGS, f"method={method}", f"precision={precision}", f"deepspeed=zero{stage}")
    if (stage, precision, method) != (1, "fp32", "cola"):
        whole = tmp_path / "whole"
        run(whole, *settings)
    run(tmp_path / "resumed", *settings, f"resume={whole}/checkpoints/step_00000012")
    ours, theirs = losses(tmp_path / "resumed"), losses(whole)
    assert min(ours) == 13 and ours == {step: theirs[step] for step in ours}
    before, after = weights(whole), weights(tmp_path / "resumed")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_ranks_and_another_stage_go_on_with_it(whole, tmp_path):
    """And so does CoLA-M's recomputation."""
    changes = ("deepspeed=zero3", "activation_checkpointing=low_rank", f"resume={whole}/checkpoints/step_00000012")
    run(tmp_path / "r", *SETTINGS, "method=cola", "precision=fp32", *changes, world_size=1)
    ours, theirs = losses(tmp_path / "r"), losses(whole)
    assert min(ours) == 13
    assert all(loss == pytest.approx(theirs[step], rel=1e-4) for step, loss in ours.items())


def test_another_rank_of_the_factors_is_another_run(whole, tmp_path):
    with pytest.raises(AssertionError, match="cola.r was 8, is 4"):
        run(tmp_path / "r", *SETTINGS, "method=cola", "cola.r=4", f"resume={whole}/checkpoints/step_00000012")


def test_another_method_is_another_run(whole, tmp_path):
    words = "method was cola, is full; cola.r was 8, is 128"
    with pytest.raises(AssertionError, match=words):
        run(tmp_path / "r", "method=full", "train.steps=18", "warm_start_steps=0", f"resume={whole}")


def test_its_updates_have_no_spectrum(whole):
    with pytest.raises(ValueError, match="step_00000018: its network has no linear layer beside its head"):
        measure([whole])


@pytest.mark.slow
def test_a_run_of_cola_m_is_that_of_cola(whole, tmp_path):
    run(tmp_path / "r", *SETTINGS, "method=cola_m", "precision=fp32", "deepspeed=zero1")
    assert losses(tmp_path / "r") == losses(whole)
    before, after = weights(whole), weights(tmp_path / "r")
    assert all(torch.equal(before[name], after[name]) for name in before)

"""A run directory that version 0.1 wrote (tests/fixtures/v0_1) is resumed, and goes the way that it would have gone."""

import json
import shutil
from pathlib import Path

import pytest

from tests.training.runs import lines, losses, run, status

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0_1"


@pytest.mark.parametrize("world_size, stage", [(2, 1), (1, 3)])
def test_a_run_of_version_0_1_is_resumed_and_its_losses_are_those_it_would_have_had(tmp_path, world_size, stage):
    directory = shutil.copytree(FIXTURE / "run", tmp_path / "run")
    run(
        directory,
        "resume=auto",
        f"data.path={FIXTURE / 'corpus'}",
        f"model.name_or_path={FIXTURE / 'model.json'}",
        f"deepspeed=zero{stage}",
        recipe=str(directory / "recipe.yaml"),
        world_size=world_size,
    )
    expected = json.loads((FIXTURE / "continuation.json").read_text())
    continued = {str(step): loss for step, loss in losses(directory).items() if step > 17}
    assert continued == pytest.approx(expected["train_loss"], rel=1e-4)
    evaluations = {str(line["step"]): line["val_loss"] for line in lines(directory, "eval") if line["step"] > 17}
    assert evaluations == pytest.approx(expected["val_loss"], rel=1e-4)
    assert [line["step"] for line in lines(directory, "train")] == list(range(1, 31)), "the earlier metrics stay"
    assert [(line["step"], line["restarts"]) for line in lines(directory, "restart")] == [(14, 1), (22, 2)]
    assert status(directory)["state"] == "done"

"""The Trainer's models: partitioned, the best one, saved alone; and steps that are not applied."""

import pytest
import torch

from tests.interop.trainers import SAVED_AT, STEPS, made_trainer, network, plain_loss, said, summary, trainers_run
from tests.ranks import ranks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_transformers_has_partitioned(tmp_path, precision):
    network(0, None).save_pretrained(tmp_path / "model")
    how = dict(stage=3, precision=precision, max_steps=6, eval_strategy="no", save_strategy="no")
    [whole] = ranks(2).run(trainers_run, str(tmp_path), **how)[0]
    [loaded] = ranks(2).run(trainers_run, str(tmp_path), load=str(tmp_path / "model"), **how)[0]
    assert loaded["restarts"] == whole["restarts"] == [4]
    if precision == "fp32":
        assert loaded["losses"] == whole["losses"]
    else:  # transformers loads weights in the precision that trains
        assert loaded["losses"] == pytest.approx(whole["losses"], rel=2e-2)


def best_run(directory: str, stage: int) -> dict:
    with made_trainer(
        directory,
        stage,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_steps=3,
        eval_on_start=True,
    ) as trainer:
        trainer.train()
        best = trainer.state.best_global_step
        random = torch.get_rng_state()
        trainer.save_model(f"{directory}/best")
        assert torch.equal(torch.get_rng_state(), random), "saving changed the order of the data that follows"
        return {
            "best": best,
            "t": trainer.model_wrapped.t,
            "eval": summary(trainer)["eval"][best],
            "eval_again": trainer.evaluate()["eval_loss"],
        }


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_best_model_is_loaded_whole(tmp_path, stage):
    found = ranks(2).run(best_run, str(tmp_path), stage)[0]
    assert found["t"] == found["best"] < STEPS
    assert found["eval_again"] == found["eval"]
    assert plain_loss(tmp_path / "best") == pytest.approx(found["eval"], rel=1e-6)


def model_only_run(directory: str) -> str:
    with made_trainer(directory, 3, save_only_model=True) as trainer:
        trainer.train()
    with made_trainer(directory, 3) as trainer:
        return said(lambda: trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-{SAVED_AT}"))


def test_a_checkpoint_of_the_model_only_is_a_model(tmp_path):
    for message in ranks(2).run(model_only_run, str(tmp_path)):
        assert "Can't find a valid checkpoint" in message
    assert plain_loss(tmp_path / f"checkpoint-{SAVED_AT}") > 0


def spoiled_run(directory: str, stage: int) -> dict:
    with made_trainer(directory, stage, save_strategy="no", eval_strategy="no") as trainer:
        trainer.spoiled_step = 2
        trainer.train()
        return {**summary(trainer), "steps": trainer.state.global_step}


@pytest.mark.parametrize("stage", [0, 1])
def test_a_bad_step_moves_no_restart_and_no_rate(tmp_path, stage):
    for run in ranks(2).run(spoiled_run, str(tmp_path), stage):
        assert run["steps"] == STEPS and run["t"] == STEPS - 1
        assert run["restarts"] == [4, 8, 12] and [entry["step"] for entry in run["reports"]] == [5, 9, 13]
        finite = run["losses"][:2] + run["losses"][3:]
        assert all(loss == loss for loss in finite)

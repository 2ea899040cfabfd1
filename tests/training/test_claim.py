"""The claim of a run directory: a start looks at it again under the lock, since others may have used it meanwhile."""

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from relora_ds.checkpoint import store
from relora_ds.checkpoint.find import ResumeError
from relora_ds.config import load_recipe
from relora_ds.training import run_directory
from relora_ds.training.lock import NAME, lock
from relora_ds.training.preflight import check
from relora_ds.training.run_directory import Claim
from relora_ds.training.trainer import Trainer
from tests.ranks import ranks
from tests.training.run_directories import SETTINGS, recipe_of, snapshot
from tests.training.runs import AfterStep, lines, status


def as_rank(overrides: list[str], run_dir: str, arrives: str) -> str:
    """Start; just before the directory is locked, somebody else uses it. Returns why this start is refused."""

    def arrive_first(directory):
        shutil.copytree(arrives, run_dir, dirs_exist_ok=True)
        return lock(directory)

    plan = check("tiny", overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "lock", arrive_first)
        try:
            Trainer(plan).fit()
        except ResumeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("how", ["resume=false", "resume=auto"])
def test_it_looks_again_when_the_tokens_are_ready(finished, tmp_path, how):
    arrived = tmp_path / "arrived"
    shutil.copytree(finished, arrived)
    if how == "resume=auto":  # and then its disk lost the checkpoints
        shutil.rmtree(arrived / "checkpoints")
    for message in ranks(2).run(
        as_rank, [*SETTINGS, f"run_dir={tmp_path / 'run'}", how], str(tmp_path / "run"), str(arrived)
    ):
        assert ("holds a run already" if how == "resume=false" else "has no checkpoint left") in message
    assert snapshot(tmp_path / "run") == snapshot(arrived)


def test_notes_that_arrive_in_the_meantime_are_not_deleted(a_run, tmp_path):
    (tmp_path / "arrived" / "mine").mkdir(parents=True)
    (tmp_path / "arrived" / "mine" / "notes.md").write_text("mine")
    [message] = ranks(1).run(
        as_rank, [*SETTINGS, f"run_dir={a_run}", "overwrite=true"], str(a_run), str(tmp_path / "arrived")
    )
    assert "holds a run and mine, which no run writes" in message
    assert (a_run / "mine" / "notes.md").exists() and len(store.directories(a_run)) == 2


def test_the_checkpoint_is_found_under_the_lock(a_run, tmp_path):
    """The old job saves on SIGTERM while the new one is starting; what it saved is not deleted."""
    shutil.move(a_run / "checkpoints" / "step_00000006", tmp_path / "arrived/checkpoints/step_00000006")
    overrides = [*SETTINGS, f"run_dir={a_run}", "resume=auto"]
    ranks(1).run(as_rank, overrides, str(a_run), str(tmp_path / "arrived"))
    assert [line["step"] for line in lines(a_run, "train")] == list(range(1, 7))
    assert [line["step"] for line in lines(a_run, "phase")][-1] == 6
    assert status(a_run)["state"] == "done"


def moved_away(overrides: list[str], run_dir: str, arrives: str) -> str:
    """Train; after 5 steps the run is moved away, and another one is where it was."""

    def watched(state):
        if state.step == 5:
            trainer.checkpoints.writer.wait()
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.move(run_dir, f"{run_dir}_moved")
                shutil.copytree(arrives, run_dir)
            dist.barrier()

    trainer = Trainer(check("tiny", overrides), [AfterStep(watched)])
    try:
        trainer.fit()
    except ResumeError as error:
        trainer.set_status("failed", str(error), 4)
        return str(error)
    return ""


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_run_that_was_moved_away_does_not_write_into_its_successor(finished, tmp_path, is_stopped):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, other)
    if not is_stopped:  # it has just begun
        for name in ("checkpoints", "summary.json", "export", "metrics.jsonl", "tensorboard"):
            shutil.rmtree(other / name) if (other / name).is_dir() else (other / name).unlink()
    overrides = [*SETTINGS, "checkpoint.every=4", f"run_dir={run}"]
    for message in ranks(2).run(moved_away, overrides, str(run), str(other)):
        assert message.startswith(f"run_dir: {run} was moved or deleted while its run trained, and another run is")
    (other / NAME).write_bytes((run / NAME).read_bytes())
    assert snapshot(run) == snapshot(other)
    assert [path.name for path in store.directories(Path(f"{run}_moved"))] == ["step_00000004"]


def together(overrides: list[str]) -> str:
    """On one of two ranks that are two starts of their own: try to get the directory, and tell how it went."""
    recipe = load_recipe("tiny", overrides)
    dist.barrier()
    try:
        claim = Claim(recipe)
    except ValueError as error:
        dist.barrier()
        return str(error)
    claim.begin()
    (Path(recipe.run_dir) / "recipe.yaml").write_text(recipe.to_yaml())
    dist.barrier()  # the other one has been refused by now
    claim.close()
    return ""


@pytest.mark.parametrize("how", ["resume=false", "resume=auto", "overwrite=true"])
def test_of_two_starts_at_once_one_gets_the_directory(finished, tmp_path, how):
    for number in range(5):
        run_dir = tmp_path / str(number)
        if how == "overwrite=true":
            shutil.copytree(finished, run_dir)
        first, second = sorted(ranks(2).run(together, [*SETTINGS, f"run_dir={run_dir}", how]))
        assert first == "" and ("is being written by" in second or "holds a run already" in second)
        assert (run_dir / "recipe.yaml").exists()


def test_a_refused_start_leaves_no_directory_and_no_lock(tmp_path, a_run):
    recipe = recipe_of(tmp_path / "a" / "b" / "c")
    Claim(recipe).close()
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    Claim(recipe).close()
    assert not any((tmp_path / "a").iterdir())
    (a_run / NAME).write_text("process 7 on elsewhere\n")
    before = snapshot(a_run)
    with pytest.raises(ValueError, match="holds a run already"):
        Claim(recipe_of(a_run))
    assert snapshot(a_run) == before
    with lock(a_run), pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on "):
        Claim(recipe_of(a_run, "overwrite=true"))

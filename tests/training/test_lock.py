"""A run directory has one writer."""

import fcntl
import os

import pytest

from relora_ds.checkpoint.find import ResumeError
from relora_ds.train import _stop
from relora_ds.training import exit_codes
from relora_ds.training.exit_codes import GuardError
from relora_ds.training.lock import NAME, lock
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.ranks import ranks
from tests.training.runs import AfterStep, run, status, train


def refused(overrides: list[str]) -> str:
    """On a rank: why it was not allowed to train."""
    try:
        train("tiny", overrides)
    except ResumeError as error:
        return str(error)
    raise AssertionError("it trained")


def contents(directory) -> dict:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", [pytest.param("resume=auto", marks=pytest.mark.slow), "overwrite=true"])
def test_a_run_that_another_process_writes_is_left_alone(tmp_path, how):
    directory = tmp_path / "run"
    run(directory, "train.steps=20", "checkpoint.every=10")
    with lock(directory):
        before = contents(directory)
        for message in ranks(2).run(refused, [f"run_dir={directory}", "train.steps=20", "checkpoint.every=10", how]):
            assert f"{directory} is being written by process {os.getpid()} on " in message
        assert contents(directory) == before
    assert run(directory, "train.steps=20", "checkpoint.every=10", how)["step"] == 20
    assert status(directory)["state"] == "done" and (directory / NAME).exists()


def fail(overrides: list[str]) -> None:
    """On a rank: what train.py does with a run that a guard ends."""

    def bad_step(run):
        raise GuardError("a step went wrong")

    trainer = Trainer(check("tiny", overrides), [AfterStep(bad_step)])
    with pytest.raises(GuardError) as caught:
        trainer.fit()
    _stop(trainer, False, str(caught.value), exit_codes.GUARD)


def test_the_last_status_is_written_after_the_directory_is_free(tmp_path):
    ranks(1).run(fail, [f"run_dir={tmp_path / 'run'}"])
    last = status(tmp_path / "run")
    assert (last["state"], last["exit_code"]) == ("failed", 3) and last["reason"].startswith("a step went wrong")


def test_a_lock_that_is_undone_leaves_what_was_there(tmp_path):
    lock(tmp_path).undo()
    assert not any(tmp_path.iterdir())
    (tmp_path / NAME).write_text("process 1 on elsewhere\n")
    lock(tmp_path).undo()
    assert (tmp_path / NAME).read_text() == "process 1 on elsewhere\n"
    with lock(tmp_path), pytest.raises(ValueError, match=f"written by process {os.getpid()} on "):
        lock(tmp_path)


def test_a_lock_file_that_another_start_removes_is_not_locked(tmp_path, monkeypatch):
    """Between its opening and its locking: two would have a lock of the same name."""
    flock, opened = fcntl.flock, []

    def removed_first(descriptor, how):
        opened.append(descriptor)
        if len(opened) == 1:
            (tmp_path / NAME).unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with lock(tmp_path):
        assert len(opened) == 2
        with pytest.raises(ValueError, match="is being written"):
            lock(tmp_path)

"""A run directory has one writer."""

import os

import pytest

from relora_ds.checkpoint.store import ResumeError
from relora_ds.training.lock import NAME, lock
from tests.ranks import ranks
from tests.training.runs import run, status, train


def refused(overrides: list[str]) -> str:
    """On a rank: why it was not allowed to train."""
    try:
        train("tiny", overrides)
    except ResumeError as error:
        return str(error)
    raise AssertionError("it trained")


def contents(directory) -> dict:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["resume=auto", "overwrite=true"])
def test_a_run_that_another_process_writes_is_left_alone(tmp_path, how):
    directory = tmp_path / "run"
    run(directory, "train.steps=20", "checkpoint.every=10")
    with lock(directory):
        before = contents(directory)
        for message in ranks(2).run(refused, [f"run_dir={directory}", "train.steps=20", "checkpoint.every=10", how]):
            assert f"{directory} is being written by process {os.getpid()} on " in message
        assert contents(directory) == before
    (directory / "notes").write_text("mine")
    assert run(directory, "train.steps=20", "checkpoint.every=10", how)["step"] == 20
    assert status(directory)["state"] == "done"
    assert (directory / "notes").exists() == (how == "resume=auto") and (directory / NAME).exists()

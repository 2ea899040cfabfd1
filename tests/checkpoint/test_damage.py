"""A damaged checkpoint is noticed and named, and the one before it serves."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from relora_ds.checkpoint import manifest, store
from relora_ds.checkpoint.find import ResumeError, find
from relora_ds.checkpoint.writer import CheckpointWriter
from tests.ranks import ranks
from tests.training.runs import AfterStep, losses, run

SETTINGS = ("train.steps=24", "checkpoint.every=6", "checkpoint.keep_last=99", "eval.samples=0", "precision=bf16")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run(directory, *SETTINGS)
    return directory


def found(run_dir) -> tuple[str, tuple[str, ...]] | str:
    try:
        checkpoint = find(run_dir, "auto")
    except ResumeError as error:
        return str(error)
    return checkpoint.directory.name, checkpoint.passed_over


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (truncate, flip)), Path.unlink]
)
def test_every_file_of_the_newest_checkpoint(whole, tmp_path, damage):
    names = sorted(path.name for path in (whole / "checkpoints" / "step_00000024").iterdir())
    assert {
        "manifest.json",
        "trained_00000.safetensors",
        "trained_00001.safetensors",
        "frozen_00001.safetensors",
        "config.json",
    } <= set(names)
    for name in names:
        copy = tmp_path / name
        shutil.copytree(whole, copy)
        damage(copy / "checkpoints" / "step_00000024" / name)
        for answer in ranks(2).run(found, copy):
            directory, passed_over = answer
            serves = "step_00000018" if name.endswith(("manifest.json", ".safetensors")) else "step_00000024"
            assert directory == serves and len(passed_over) == 1 and name in passed_over[0]


def test_it_goes_on_from_the_one_before(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    truncate(tmp_path / "r" / "checkpoints" / "step_00000024" / "trained_00001.safetensors")
    run(tmp_path / "r", *SETTINGS, "resume=auto")
    assert losses(tmp_path / "r") == losses(whole)
    assert store.verify(tmp_path / "r" / "checkpoints" / "step_00000024") == []


def test_latest_that_points_nowhere_is_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    (tmp_path / "r" / "checkpoints" / "latest").write_text("step_00009999")
    directory, (line,) = ranks(2).run(found, tmp_path / "r")[1]
    assert directory == "step_00000024" and "'step_00009999', which is not there" in line


def test_when_none_is_intact_it_says_so(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    for path in (tmp_path / "r" / "checkpoints").glob("step_*/trained_00000.safetensors"):
        path.unlink()
    for message in ranks(2).run(found, tmp_path / "r"):
        assert message.count("trained_00000.safetensors is missing") == 4 and "overwrite=true" in message


def test_a_manifest_cannot_lead_out_of_its_checkpoint(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    path = tmp_path / "r" / "checkpoints" / "step_00000024" / "manifest.json"
    content = json.loads(path.read_text())
    content["files"]["../../../secret.safetensors"] = content["files"].pop("trained_00000.safetensors")
    del content["sha256"]
    path.write_text(json.dumps({"sha256": manifest._digest(content), **content}))
    directory, passed_over = ranks(2).run(found, tmp_path / "r")[0]
    assert directory == "step_00000018" and "no file of a checkpoint" in passed_over[0]


def test_checkpoints_of_a_cycle_share_the_files_of_what_is_frozen(whole):
    inodes = {
        step: {path.stat().st_ino for path in (whole / "checkpoints" / f"step_{step:08d}").glob("frozen_*")}
        for step in (12, 18, 24)
    }
    assert inodes[12] == inodes[18] and len(inodes[18]) == 2
    assert not inodes[18] & inodes[24]  # there was a restart after step 20


def failing_save(run_dir, size: int) -> list:
    """Train with a limit on the size of files from step 8 on, on rank 1 only."""
    import resource

    from relora_ds.training.preflight import check
    from relora_ds.training.trainer import Trainer

    limits, said = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def watched(state):
        if state.step == 8 and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        if state.step == 14:
            trainer.checkpoints.writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def take_finished(writer):
        said.extend(writer._done)
        return take(writer)

    trainer = Trainer(check("tiny", [f"run_dir={run_dir}", *SETTINGS]), [AfterStep(watched)])
    take = CheckpointWriter.take_finished
    with mock.patch.object(CheckpointWriter, "take_finished", take_finished):
        trainer.fit()
    return [(done.step, done.error) for done in said]


def test_a_full_disk_costs_one_checkpoint(whole, tmp_path):
    for done in ranks(2).run(failing_save, tmp_path / "r", 4096):
        assert [step for step, _ in done] == [6, 12, 18, 24]
        errors = [error for _, error in done]
        assert errors[0] is errors[2] is errors[3] is None and errors[1].startswith("rank 1 on ")
    assert losses(tmp_path / "r") == losses(whole)
    names = sorted(path.name for path in (tmp_path / "r" / "checkpoints").iterdir())
    assert names == ["latest", "step_00000006", "step_00000018", "step_00000024", "tokenizer"]

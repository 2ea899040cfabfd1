"""Checkpoints of a cycle share the files of what is frozen; where that cannot be, they are written again."""

import errno
import os
import shutil
import signal
import socket
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from relora_ds.checkpoint import manifest, rank_files, sharing, store, writer
from relora_ds.checkpoint.manifest import File
from relora_ds.checkpoint.writer import CheckpointWriter
from relora_ds.training.exit_codes import GuardError
from relora_ds.training.hooks.saving import Checkpoints
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from relora_ds.zero.checkpoints import writer_of
from tests.faults.test_stop import train_and_signal
from tests.parity import cases
from tests.ranks import ranks
from tests.training.runs import run, status

NAME = "frozen_00000.safetensors"


def lose(path: Path) -> None:
    shutil.rmtree(path)


def archive(path: Path) -> None:
    path.rename(path.parent.parent / f"archive_{path.name}")


def lose_one_file(path: Path) -> None:
    (path / NAME).unlink()


def truncate(path: Path) -> None:
    os.truncate(path / NAME, 100)


def replace(path: Path) -> None:
    content = bytearray((path / NAME).read_bytes())
    content[-3] ^= 1
    (path / NAME).unlink()
    (path / NAME).write_bytes(content)


def change(path: Path) -> None:
    """In place, size and inode stay."""
    content = bytearray((path / NAME).read_bytes())
    content[-3] ^= 1
    (path / NAME).write_bytes(content)


def nothing(path: Path) -> None:
    pass


def save_twice(directory: Path, accident, host: str | None, link_error: int | None) -> list:
    """On a rank: save, have an accident, save; and again from a checkpoint of another run."""
    engine, done = cases.build(1), []
    cases.train_step(engine, 0)
    real = socket.gethostname
    for number, continues in enumerate((None, directory / "0" / "step_00000003")):
        known = continues and (continues, manifest.read(continues))
        written = writer_of(engine, directory / str(number), continues=known)
        if known is None:
            written.save(1, {})
            written.wait()
            old = directory / "0" / "step_00000001"
        else:
            old = continues
        dist.barrier()
        if dist.get_rank() == 0:
            accident(old)
        dist.barrier()
        with (
            mock.patch.object(socket, "gethostname", lambda: host or real()),
            mock.patch.object(os, "link", failing(link_error) if link_error else os.link),
        ):
            for step in (2, 3):
                written.save(step, {})
                written.wait()
        done += written.take_finished()
        written.close()
    cases.release(engine)
    return [(one.step, one.error, one.bytes - one.new_bytes > 0) for one in done]


def failing(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("accident", "host", "link_error", "is_shared"),
    [
        (nothing, None, None, True),
        (nothing, "renamed", None, True),
        (lose, None, None, False),
        (lose, "renamed", None, False),
        (archive, None, None, False),
        (lose_one_file, "renamed", None, False),
        (truncate, None, None, False),
        (replace, None, None, False),
        (change, None, None, False),
        (nothing, None, errno.EXDEV, False),
    ],
    ids=[
        "whole",
        "renamed",
        "lost",
        "lost_renamed",
        "archived",
        "one_lost",
        "truncated",
        "replaced",
        "changed",
        "other_disk",
    ],
)
def test_whatever_becomes_of_the_source_every_checkpoint_is_whole(tmp_path, accident, host, link_error, is_shared):
    for done in ranks(2).run(save_twice, tmp_path, accident, host, link_error):
        later = link_error is None  # the next one shares those that were written again
        assert done == [
            (1, None, False),
            (2, None, is_shared),
            (3, None, later),
            (2, None, is_shared),
            (3, None, later),
        ]
    shares_an_inode = accident in (truncate, change)  # with the checkpoint that had the accident
    others = [] if shares_an_inode else [tmp_path / "0" / "step_00000002"]
    for directory in (*(tmp_path / "1").glob("step_*"), *others):
        assert store.verify(directory) == [] and (directory / NAME).is_file()


def lose_before_the_rename(directory: Path, name: str) -> list:
    """On a rank: save, and a file vanishes before it becomes a checkpoint."""
    engine = cases.build(1)
    written = writer_of(engine, directory)
    real = CheckpointWriter._lacks

    def losing(self, temporary, listed):
        if dist.get_rank() == 1:
            (temporary / name).unlink()
        self._words(None)
        return real(self, temporary, listed)

    with mock.patch.object(CheckpointWriter, "_lacks", losing):
        written.save(1, {})
        written.wait()
    written.save(1, {})
    written.close()
    cases.release(engine)
    return [done.error for done in written.take_finished()]


@pytest.mark.parametrize("name", ["trained_00001.safetensors", NAME, "config.json"])
def test_before_the_rename_every_file_is_there(tmp_path, name):
    for first, second in ranks(2).run(lose_before_the_rename, tmp_path, name):
        assert first.endswith(f"{name} is not there, or has another size than what was written") and second is None
    (directory,) = store.directories(tmp_path)
    assert store.verify(directory) == []


def test_what_another_host_has_written_may_be_seen_late(tmp_path, monkeypatch):
    """On a network disk: first not there, then empty, then whole."""
    path, looks = tmp_path / "trained_00001.safetensors", []
    writes = iter([lambda: None, path.touch, lambda: path.write_bytes(b"12345")])
    monkeypatch.setattr(writer.time, "sleep", lambda _: (looks.append(1), next(writes)()))
    late = CheckpointWriter.__new__(CheckpointWriter)
    late._sharing = sharing.Sharing(True, [0, 1], True)
    assert late._sees(path, File(5, "", "another"), writer.time.monotonic() + 60) and len(looks) == 3
    assert not late._sees(path, File(6, "", socket.gethostname()), writer.time.monotonic() + 60)
    late._sharing = sharing.Sharing(True, [0], False)
    assert not late._sees(tmp_path / "trained_00002.safetensors", File(5, "", "another"), writer.time.monotonic() + 60)


SETTINGS = ["eval.samples=0", "precision=bf16", "train.steps=36"]


def stop_without_the_source(overrides: list[str], source: str) -> tuple:
    """On a rank: go on from another run, which is deleted; then SIGTERM."""
    enter = Checkpoints.on_phase

    def losing(self, state):
        enter(self, state)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(source, ignore_errors=True)
        dist.barrier()

    with mock.patch.object(Checkpoints, "on_phase", losing):
        return train_and_signal([*overrides, f"resume={source}"], signal.SIGTERM, 1, 16)


def test_a_run_whose_source_was_deleted_saves_itself_when_it_is_stopped(tmp_path):
    run(tmp_path / "first", *SETTINGS, "checkpoint.every=12", "checkpoint.keep_last=9")
    for kind, said, last in ranks(2).run(
        stop_without_the_source,
        [f"run_dir={tmp_path / 'r'}", *SETTINGS],
        str(tmp_path / "first" / "checkpoints" / "step_00000012"),
    ):
        assert kind == "Preempted" and f"saved after step {last}" in said
    (directory,) = store.directories(tmp_path / "r")
    assert store.verify(directory) == [] and (directory / NAME).is_file()


def end_on_a_full_disk(run_dir: str, failures: int) -> str:
    """On a rank: train; the first attempts to write a checkpoint fail."""
    real, calls = rank_files.save_file, []

    def full(*arguments):
        calls.append(1)
        if len(calls) <= failures:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    with mock.patch.object(rank_files, "save_file", full):
        try:
            Trainer(
                check("tiny", [f"run_dir={run_dir}", "eval.samples=0", "train.steps=14", "checkpoint.every=null"])
            ).fit()
        except GuardError as error:
            return str(error)
    return ""


def test_the_last_checkpoint_is_tried_again(tmp_path):
    assert ranks(2).run(end_on_a_full_disk, str(tmp_path / "r"), 1) == ["", ""]
    (directory,) = store.directories(tmp_path / "r")
    assert store.verify(directory) == [] and status(tmp_path / "r")["state"] == "done"


def test_a_run_whose_end_is_not_saved_is_not_called_done(tmp_path):
    for said in ranks(2).run(end_on_a_full_disk, str(tmp_path / "r"), 99):
        assert said == (
            f"the state after step 14 could not be saved; the model is in {tmp_path / 'r' / 'export'}. "
            "Nothing was saved"
        )
    assert (tmp_path / "r" / "export" / "model.safetensors").is_file() and status(tmp_path / "r")["state"] == "running"

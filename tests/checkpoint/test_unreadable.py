"""What cannot be read now, is of a newer version, or is not seen yet is neither deleted nor passed over."""

import json
import os
import time
from pathlib import Path

import pytest

from relora_ds.__main__ import main
from relora_ds.checkpoint import manifest, store
from relora_ds.checkpoint.find import ResumeError, find
from relora_ds.checkpoint.manifest import File, Manifest
from relora_ds.utils.files import sha256
from tests.ranks import ranks

HERE = store.socket.gethostname()
TRAINED, FROZEN = "trained_00000.safetensors", "frozen_00001.safetensors"


def checkpoint(run_dir: Path, step: int, hosts: tuple[str, str] = (HERE, HERE)) -> Path:
    """A checkpoint whose files hold no tensors: looking at it is all that these tests do."""
    directory = run_dir / "checkpoints" / manifest.tag_of(step)
    directory.mkdir(parents=True)
    files = {}
    for name, host in ((TRAINED, hosts[0]), (FROZEN, hosts[1]), ("config.json", hosts[0])):
        (directory / name).write_text(f"{name} of step {step}")
        files[name] = File((directory / name).stat().st_size, sha256(directory / name), host)
    Manifest(step, {}, {}, {}, files, {}).write(directory)
    return directory


@pytest.fixture
def three(tmp_path):
    return [checkpoint(tmp_path, step) for step in (1, 2, 3)]


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in store.directories(run_dir)]


def lock_manifest(directory: Path) -> None:
    """Opening it is an OSError, also for root."""
    (directory / manifest.NAME).rename(directory / "moved")
    (directory / manifest.NAME).symlink_to(manifest.NAME)


def lock_weights(directory: Path) -> None:
    (directory / TRAINED).unlink()
    (directory / TRAINED).symlink_to(TRAINED)


def of_newer_format(directory: Path) -> None:
    path = directory / manifest.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7, "shards": []}))


@pytest.mark.parametrize("name", ["notes.md", "hf/model.safetensors", "model.safetensors", "more/config.json"])
def test_what_somebody_put_into_a_checkpoint_is_not_deleted(three, tmp_path, name, caplog):
    (three[0] / name).parent.mkdir(exist_ok=True)
    (three[0] / name).write_text("mine")
    assert store.prune(tmp_path, 1, None) == [three[1]] and steps(tmp_path) == [1, 3]
    assert "step_00000001 is not deleted: it holds" in caplog.text and (three[0] / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lock_manifest, "manifest.json cannot be read now: Too many levels of symbolic links"),
        (lock_weights, f"{TRAINED} cannot be read now: Too many levels of symbolic links"),
        (of_newer_format, "was written by a newer relora_ds (format 7; this one reads 1): update relora_ds"),
    ],
)
def test_it_is_not_called_damaged(three, tmp_path, damage, words, caplog, capsys):
    damage(three[2])
    assert store.prune(tmp_path, 1, None) == three[:1] and steps(tmp_path) == [2, 3]
    assert "step_00000003 is neither counted nor deleted" in caplog.text and words in caplog.text
    before = contents(tmp_path)
    for said in ranks(2).run(found, tmp_path, "auto"):
        assert words in said and "Nothing was changed" in said and "resume=RUN/checkpoints/step_" in said
    assert contents(tmp_path) == before
    assert ranks(1).run(found, tmp_path, str(three[1])) == ["step_00000002"]
    capsys.readouterr()  # warnings too, where an earlier test has set up the console
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step_00000002: intact" and words in second


def contents(run_dir: Path) -> list[str]:
    return sorted(str(path) for path in run_dir.rglob("*"))


def found(run_dir: Path, resume: str) -> str:
    try:
        return find(run_dir, resume).directory.name
    except ResumeError as error:
        return str(error)


def test_where_nothing_can_be_told_nothing_is_deleted(three, tmp_path):
    for path in three:
        lock_manifest(path)
    with pytest.raises(ValueError, match="no checkpoint is intact, and none is deleted"):
        store.prune(tmp_path, 1, None)
    assert steps(tmp_path) == [1, 2, 3]


def test_proof_in_one_file_is_enough(three, tmp_path):
    lock_weights(three[2])
    (three[2] / FROZEN).write_text("short")
    assert ranks(2).run(found, tmp_path, "auto") == ["step_00000002"] * 2
    assert store.prune(tmp_path, 2, None) == [three[2]]


def find_with_warnings(run_dir: Path) -> tuple:
    checkpoint = find(run_dir, "auto")
    return checkpoint.directory.name, checkpoint.passed_over, checkpoint.damaged


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda path: path.write_bytes(b"\xff"), lambda path: (path.unlink(), path.symlink_to(path.name))],
    ids=["gone", "damaged", "unreadable"],
)
def test_a_configuration_costs_a_warning(three, tmp_path, damage):
    damage(three[2] / "config.json")
    (name, (warning,), damaged), *_ = ranks(2).run(find_with_warnings, tmp_path)
    assert name == "step_00000003" and "config.json" in warning and "can do without" in warning and damaged == ()
    assert store.prune(tmp_path, 1, None) == three[:2]


# -- hosts ------------------------------------------------------------------------------------------------------------


def age(directory: Path, seconds: float) -> None:
    os.utime(directory, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("")], ids=["gone", "empty"])
def test_what_another_host_has_just_written_may_not_be_seen_yet(tmp_path, damage):
    checkpoint(tmp_path, 1)
    late = checkpoint(tmp_path, 2, (HERE, "another"))
    damage(late / FROZEN)
    for is_here in (None, lambda name: True):
        assert store.prune(tmp_path, 9, None, is_here) == [] and steps(tmp_path) == [1, 2]
    age(late, 2 * store.LATE_S)
    assert store.prune(tmp_path, 9, None, lambda name: True) == [late]


def find_late(run_dir: Path) -> str:
    """On a rank: the file is seen when it has been waited for."""
    path = run_dir / "checkpoints" / "step_00000002" / FROZEN
    real = time.sleep
    time.sleep = lambda _: os.path.exists(away := path.with_name("away")) and os.replace(away, path)
    try:
        return found(run_dir, "auto")
    finally:
        time.sleep = real


def test_resume_waits_for_what_another_host_has_just_written(tmp_path):
    checkpoint(tmp_path, 1)
    late = checkpoint(tmp_path, 2, (HERE, "another"))
    (late / FROZEN).rename(late / "away")
    assert ranks(1).run(find_late, tmp_path) == ["step_00000002"]


def test_a_disk_of_each_host(tmp_path):
    """A file that is not here may be on the disk of the host that wrote it, whatever this host's name is now."""
    for step in (1, 2):
        directory = checkpoint(tmp_path, step, ("old name", "another"))
        (directory / FROZEN).unlink()
        age(directory, 2 * store.LATE_S)
    with pytest.raises(ValueError, match="none is deleted"):
        store.prune(tmp_path, 1, None)  # this process cannot know
    assert store.prune(tmp_path, 1, None, lambda name: name != FROZEN) == [directory.with_name("step_00000001")]
    with pytest.raises(ValueError, match="none is deleted"):
        store.prune(tmp_path, 1, None, lambda name: True)
    assert steps(tmp_path) == [2]


def test_a_file_that_a_renamed_host_has_lost_is_lost(tmp_path):
    """It was taken for another host's: the checkpoint counted as whole, and the last whole one was deleted."""
    whole = checkpoint(tmp_path, 1, ("old", "old"))
    lacking = checkpoint(tmp_path, 2, ("old", "old"))
    (lacking / FROZEN).unlink()
    age(lacking, 2 * store.LATE_S)
    assert store.prune(tmp_path, 1, None) == [lacking] and store.directories(tmp_path) == [whole]


# -- going back -------------------------------------------------------------------------------------------------------


def test_going_back_deletes_nothing(three, tmp_path):
    lock_manifest(three[1])
    of_newer_format(three[2])
    before = {path.name: sorted(os.listdir(path)) for path in three}
    store.drop_after(tmp_path, 1)
    replaced = three[0].parent / "replaced"
    assert steps(tmp_path) == [1] and (three[0].parent / "latest").read_text() == "step_00000001"
    assert {path.name: sorted(os.listdir(path)) for path in (three[0], *replaced.iterdir())} == before
    checkpoint(tmp_path, 2)
    store.drop_after(tmp_path, 1)
    assert sorted(os.listdir(replaced)) == ["step_00000002", "step_00000002.2", "step_00000003"]


def test_an_earlier_damaged_one_stays(three, tmp_path):
    names = ["step_00000003.damaged", "step_00000003.damaged.2", "step_00000003.damaged.3"]
    for number in range(3):
        (three[2] / "number").write_text(str(number))
        store.drop_after(tmp_path, 2, (three[2],))
        three[2].mkdir()
    assert [(tmp_path / "checkpoints" / name / "number").read_text() for name in names] == ["0", "1", "2"]


def test_a_checkpoint_that_is_a_link_loses_the_link_only(three, tmp_path):
    three[0].rename(tmp_path / "archive")
    three[0].symlink_to(tmp_path / "archive")
    assert store.prune(tmp_path, 1, None) == three[:2]
    assert steps(tmp_path) == [3] and (tmp_path / "archive" / manifest.NAME).is_file()
    assert not list(three[0].parent.glob(".*"))

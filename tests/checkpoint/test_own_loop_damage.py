"""What `engine.load_checkpoint` makes of damage, and what a failed or killed `save_checkpoint` leaves."""

import errno
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from relora_ds.checkpoint import store
from relora_ds.checkpoint.removal import delete_leftovers, replaced_name
from tests.faults.kills import Mortal
from tests.parity import cases
from tests.ranks import ranks
from tests.zero.test_nonfinite import everything


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_where_one_rank_fails(directory: str, rank: int, name: str) -> str:
    """On a rank: save, and once more with a rank that cannot write."""
    engine, said = cases.build(1, precision="bf16"), ""
    engine.save_checkpoint(directory, "first")
    with mock.patch(name, full) if dist.get_rank() == rank else nullcontext():
        try:
            engine.save_checkpoint(directory, "first")
        except OSError as error:
            said = str(error)
    cases.release(engine)
    return said


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        (1, "relora_ds.checkpoint.rank_files.save_file"),
        pytest.param(0, "relora_ds.checkpoint.rank_files.save_file", marks=pytest.mark.slow),
        (1, "relora_ds.zero.capture.HostCopies.take"),
        (0, "relora_ds.zero.capture.engine_state"),
        (0, "relora_ds.checkpoint.manifest.Manifest.write"),
    ],
)
def test_where_one_rank_cannot_write_all_of_them_hear_of_it(tmp_path, rank, name):
    for said in ranks(2).run(save_where_one_rank_fails, str(tmp_path), rank, name, timeout=120):
        assert said.startswith(f"save_checkpoint: rank {rank} on ") and said.endswith("No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "latest"]
    assert store.verify(tmp_path / "first") == []


def load_with(directory: str, damage, tag: str | None) -> tuple:
    """On a rank: save twice, damage, load."""
    engine, saved = cases.build(1, precision="bf16"), {}
    for step, name in enumerate(("older", "newer")):
        cases.train_step(engine, step)
        engine.save_checkpoint(directory, name)
        saved[name] = everything(engine)
    cases.train_step(engine, 2)
    before = everything(engine)
    dist.barrier()
    if dist.get_rank() == 0:
        damage(Path(directory))
    dist.barrier()
    try:
        path, _ = engine.load_checkpoint(directory, tag)
        return Path(path).name, everything(engine) == saved[Path(path).name]
    except ValueError as error:
        return str(error), everything(engine) == before
    finally:
        cases.release(engine)


def one_bad_byte(directory: Path) -> None:
    (directory / "latest").write_bytes(b"new\xffr")


def leads_elsewhere(directory: Path) -> None:
    shutil.copytree(directory / "older", directory.parent / "elsewhere")
    (directory / "latest").write_text("../elsewhere")


def names_nothing(directory: Path) -> None:
    (directory / "latest").write_text("nothing")


def is_missing(directory: Path) -> None:
    (directory / "latest").unlink()


def names_the_older(directory: Path) -> None:
    (directory / "latest").write_text("older")


def no_manifest(directory: Path) -> None:
    (directory / "newer" / "manifest.json").write_bytes(b"\xff{")


def flipped_bit(directory: Path) -> None:
    path = directory / "newer" / "trained_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut_short(directory: Path) -> None:
    os.truncate(directory / "newer" / "frozen_00000.safetensors", 100)


def all_of_them(directory: Path) -> None:
    for name in ("older", "newer"):
        (directory / name / "trained_00000.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "loaded"),
    [
        (one_bad_byte, "newer"),
        pytest.param(leads_elsewhere, "newer", marks=pytest.mark.slow),
        (names_nothing, "newer"),
        pytest.param(is_missing, "newer", marks=pytest.mark.slow),
        (names_the_older, "older"),
        pytest.param(no_manifest, "older", marks=pytest.mark.slow),
        (flipped_bit, "older"),
    ],
)
def test_a_damaged_pointer_or_checkpoint_costs_a_warning(tmp_path, damage, loaded):
    assert ranks(2).run(load_with, str(tmp_path / "c"), damage, None, timeout=120) == [(loaded, True)] * 2


@pytest.mark.parametrize(
    ("damage", "tag", "says"),
    [
        (flipped_bit, "newer", "trained_00001.safetensors is not what was written (its sha256 differs)"),
        (cut_short, "newer", "frozen_00000.safetensors has 100 bytes instead of"),
        (all_of_them, None, "is intact"),
        (is_missing, "none", "none/manifest.json is missing"),
    ],
)
def test_damage_is_named_and_nothing_is_loaded(tmp_path, damage, tag, says):
    for message, unchanged in ranks(2).run(load_with, str(tmp_path / "c"), damage, tag, timeout=120):
        assert message.startswith("load_checkpoint: ") and says in message and unchanged


def save_and_die(directory: str, tags: list[str], call: int) -> None:
    """On a rank: save under both names; rank 0 dies at the beginning of call number `call` of os.replace."""
    engine, real, calls = cases.build(1, precision="bf16"), os.replace, iter(range(1, 100))

    def deadly(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    if dist.get_rank() == 0:
        os.replace = deadly
    for step, tag in enumerate(tags):
        cases.train_step(engine, step)
        engine.save_checkpoint(directory, tag)


def load_what_is_left(directory: str) -> int:
    engine = cases.build(3, precision="bf16", model_seed=1)
    engine.load_checkpoint(directory)
    t = engine.t
    cases.train_step(engine, t)
    engine.save_checkpoint(directory, "last")
    cases.release(engine)
    return t


# A first save replaces: its manifest, the directory, `latest`.
MANIFEST, DIRECTORY, LATEST = 4, 5, 6
OLD_ONE, NEW_ONE = 5, 6  # under a name that is used again


@pytest.mark.parametrize(
    ("tags", "call", "left"),
    [
        # What a run leaves there is tried every time: tests/faults/test_scenarios.py.
        pytest.param(["first", "last"], MANIFEST, 1, marks=pytest.mark.slow),
        pytest.param(["first", "last"], DIRECTORY, 1, marks=pytest.mark.slow),
        pytest.param(["first", "last"], LATEST, 1, marks=pytest.mark.slow),
        pytest.param(["last", "last"], OLD_ONE, 1, marks=pytest.mark.slow),
        (["last", "last"], NEW_ONE, 1),
    ],
    ids=["manifest", "directory", "latest", "same_name_old_one", "same_name_new_one"],
)
def test_killed_in_the_middle_of_a_save_the_one_before_is_left(tmp_path, tags, call, left):
    mortal = Mortal(2)
    with pytest.raises(AssertionError, match="it died|Connection|gloo"):
        mortal.run(save_and_die, str(tmp_path), tags, call)
    mortal.stop()
    assert ranks(1).run(load_what_is_left, str(tmp_path)) == [left]
    assert {path.name for path in tmp_path.iterdir()} <= {"first", "last", "latest"}
    assert store.verify(tmp_path / "last") == []


def test_a_checkpoint_whose_successor_never_came_is_no_leftover(tmp_path):
    for name in (replaced_name("step_00000005"), ".step_00000005.writing", ".step_00000004.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    delete_leftovers(tmp_path)
    assert [path.name for path in store.tagged(tmp_path)] == [".step_00000005.replaced"]
    assert [path.name for path in tmp_path.iterdir()] == [".step_00000005.replaced"]


def load_what_cannot_be_looked_at(directory: str) -> str:
    """On a rank: rank 0 alone looks which checkpoint there is, and meets an error."""
    engine, said = cases.build(1, precision="bf16"), ""
    try:
        engine.load_checkpoint(directory, "too_long" * 100)
    except ValueError as error:
        said = str(error)
    cases.release(engine)
    return said


def test_an_error_where_rank_0_looks_is_all_ranks(tmp_path):
    for said in ranks(2).run(load_what_cannot_be_looked_at, str(tmp_path), timeout=120):
        assert (
            said
            == f"load_checkpoint: {tmp_path} cannot be read now: rank 0: OSError: " + said.partition("OSError: ")[2]
        )
        assert "File name too long" in said

"""Which checkpoint is resumed from: of the disk, or of the store."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from relora_ds.checkpoint.find import ResumeError
from relora_ds.remote.newest import find_newest
from relora_ds.remote.place import Place
from relora_ds.remote.stored_run import StoredRun
from tests.ranks import ranks
from tests.remote import stores
from tests.remote.runs import fit

TAGS = ("step_00000006", "step_00000012", "step_00000018")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "r"
    ranks(2).run(fit, [f"run_dir={directory}", "train.steps=18", "checkpoint.keep_last=9"])
    return directory


@pytest.fixture
def store(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "store")


def newest(run_dirs: list[Path], store: Path, same: bool = True, faults=()) -> tuple:
    """On a rank: (the checkpoint, what was passed over, what was fetched), or why there is none."""
    stores.FAULTS[:] = [getattr(stores, name)(*arguments) for name, *arguments in faults]
    fetched = []
    stores.FAULTS.append(lambda what, path: fetched.append(Path(path).name) if what == "get" else None)
    try:
        run = StoredRun(Place(stores.url(store)))
        found = find_newest(run, run_dirs[dist.get_rank()], lambda manifest: None, lambda manifest: same)
    except ResumeError as error:
        return str(error), (), []
    finally:
        stores.FAULTS.clear()
    return found and found.directory.name, found and found.passed_over, sorted({*fetched} - {"manifest.json"})


def ask(run: Path, store: Path, **options) -> tuple:
    """On two ranks of one disk: the same answer of both; what was fetched, by either."""
    run.mkdir(exist_ok=True)
    (tag, lines, first), (same, _, second) = ranks(2).run(newest, [run, run], store, **options)
    assert tag == same and not {*first} & {*second}, "a file is fetched once for a disk"
    return tag, lines, sorted(first + second)


def copy(whole: Path, run: Path, *tags: str) -> None:
    for tag in tags:
        shutil.copytree(whole / "checkpoints" / tag, run / "checkpoints" / tag)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


FILES = [f"{kind}_0000{rank}.safetensors" for kind in ("frozen", "trained") for rank in (0, 1)]


def test_the_newest_of_the_store_is_fetched_to_an_empty_disk_and_not_again(tmp_path, store):
    run = tmp_path / "r"
    tag, lines, fetched = ask(run, store)
    assert (tag, lines) == (TAGS[2], ()) and fetched == sorted(["config.json", *FILES])
    assert (run / "metrics.jsonl").read_bytes() == (store / "metrics.jsonl").read_bytes()
    assert ask(run, store) == (TAGS[2], (), [])


def test_a_newer_one_of_the_disk_is_used(tmp_path, store, whole):
    copy(whole, tmp_path / "r", *TAGS)
    shutil.rmtree(store / "checkpoints" / TAGS[2])
    assert ask(tmp_path / "r", store) == (TAGS[2], (), [])


def test_one_without_a_manifest_is_none(tmp_path, store):
    (store / "checkpoints" / TAGS[2] / "manifest.json").unlink()
    assert ask(tmp_path / "r", store)[:2] == (TAGS[1], ())


@pytest.mark.parametrize("name", ["trained_00001.safetensors", "manifest.json"])
def test_a_damaged_one_of_the_store_is_named_and_passed_over(tmp_path, store, name):
    flip(store / "checkpoints" / TAGS[2] / name)
    tag, (line,), _ = ask(tmp_path / "r", store)
    assert tag == TAGS[1] and f"{TAGS[2]} is damaged: {name} " in line
    assert [path.name for path in (tmp_path / "r/checkpoints").iterdir()] == [TAGS[1]]


def test_a_missing_file_of_the_store_is_damage(tmp_path, store):
    (store / "checkpoints" / TAGS[2] / "frozen_00000.safetensors").unlink()
    assert ask(tmp_path / "r", store)[0] == TAGS[1]


def test_what_is_damaged_on_the_disk_is_fetched_and_only_that(tmp_path, store, whole):
    copy(whole, tmp_path / "r", *TAGS[1:])
    flip(tmp_path / "r/checkpoints" / TAGS[2] / "trained_00000.safetensors")
    tag, lines, fetched = ask(tmp_path / "r", store)
    assert tag == TAGS[2] and fetched == ["trained_00000.safetensors"]
    assert any("is damaged" in line for line in lines)
    assert (tmp_path / "r/checkpoints" / f"{TAGS[2]}.damaged").is_dir()


def test_damage_everywhere_is_refused(tmp_path, store):
    for tag in TAGS:
        flip(store / "checkpoints" / tag / "trained_00000.safetensors")
    reason = ask(tmp_path / "r", store)[0]
    assert "no checkpoint is intact. Start again with overwrite=true" in reason


def test_a_store_that_refuses_now_is_no_damage(tmp_path, store):
    reason = ask(tmp_path / "r", store, faults=[("fails", "get", "trained_00001")])[0]
    assert "cannot be fetched now (PermissionError: Access Denied" in reason and TAGS[2] in reason


@pytest.mark.parametrize("same", [True, False])
def test_a_host_with_a_disk_of_its_own_fetches_what_its_ranks_need(tmp_path, store, whole, same):
    """One host has lost its disk. Of a run on other ranks each host needs everything."""
    runs = [tmp_path / "host_0", tmp_path / "host_1"]
    copy(whole, runs[0], TAGS[2])
    for path in (runs[0] / "checkpoints" / TAGS[2]).glob("*_00001.safetensors"):
        path.unlink()
    (tag, _, first), (_, _, second) = ranks(2).run(newest, runs, store, same=same)
    assert tag == TAGS[2] and first == ([] if same else [name for name in FILES if "_00001" in name])
    assert second == ["config.json"] + ([name for name in FILES if "_00001" in name] if same else FILES)
    assert [path.name for path in (runs[0] / "checkpoints").iterdir() if same] == ([TAGS[2]] if same else [])

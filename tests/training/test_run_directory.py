"""What a run directory holds, and where it may be. Files of others keep it from being overwritten."""

import os
import shutil
from pathlib import Path

import pytest

from relora_ds.training import run_contents
from relora_ds.training.lock import NAME
from relora_ds.training.run_directory import Claim, early_problems, problems
from tests.training.run_directories import recipe_of, snapshot


def test_everything_that_a_run_writes_is_known(a_run):
    found = run_contents.look(a_run)
    assert found.is_run and not found.foreign
    for name in (
        "status.json.host.7.tmp",
        "metrics.tmp",
        "checkpoints/latest.host.7.tmp",
        ".nfs0001",
        f"checkpoints/.{'0' * 8}-{'0' * 4}-{'0' * 4}-{'0' * 4}-{'0' * 12}_rank_0",
    ):
        (a_run / name).touch()
    for name in (".step_00000009", ".step_00000003.old", "step_00000009.damaged"):
        shutil.copytree(a_run / "checkpoints" / "step_00000003", a_run / "checkpoints" / name)
    assert not run_contents.look(a_run).foreign
    run_contents.delete(a_run)
    assert {path.name for path in a_run.iterdir()} == {"recipe.yaml", "status.json", NAME, ".nfs0001"}


@pytest.mark.parametrize("name", ["status.json", "recipe.yaml", "summary.json", "metrics.jsonl", "checkpoints"])
def test_one_file_is_enough_to_know_a_run(a_run, tmp_path, name):
    (tmp_path / "other").mkdir()
    os.rename(a_run / name, tmp_path / "other" / name)
    assert run_contents.look(tmp_path / "other") == run_contents.Contents(True, True)


@pytest.mark.parametrize(
    "name",
    [
        "notes.md",
        "seed1/recipe.yaml",
        "checkpoints/best/model.pt",
        "export/eval.json",
        "checkpoints/step_00000003/notes.md",
        "tensorboard/mine/events",
        "export/notes.md",
        "checkpoints/tokenizer/words.csv",
        "checkpoints/step_00000003-copy/manifest.json",
    ],
)
def test_anything_else_in_a_run_keeps_it_from_being_overwritten(a_run, refused, name):
    (a_run / name).parent.mkdir(exist_ok=True)
    (a_run / name).write_text("mine")
    shown = (
        name
        if (a_run / name).parent.name in ("run", "export", "tokenizer", "step_00000003")
        else name.rpartition("/")[0]
    )
    printed = refused(a_run, f"run_dir={a_run}", "overwrite=true")
    assert f"holds a run and {shown}, which no run writes" in printed and "choose another run_dir" in printed


@pytest.mark.parametrize("name", ["checkpoints", "export", "recipe.yaml", "checkpoints/step_00000003"])
def test_a_link_in_a_run_is_not_followed_and_not_deleted(a_run, tmp_path, refused, name):
    os.rename(a_run / name, tmp_path / "elsewhere")
    (a_run / name).symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    assert f"{name} (a symbolic link)" in refused(a_run, f"run_dir={a_run}", "overwrite=true")
    run_contents.delete(a_run)  # even if it came that far
    assert snapshot(tmp_path / "elsewhere") == {
        p.relative_to("elsewhere"): content
        for p, content in before.items()
        if p.parts[0] == "elsewhere" and len(p.parts) > 1
    }


def others(tmp_path: Path, kind: str) -> Path:
    """A directory of another program, or of a user, with names that are ours too."""
    directory = tmp_path / "project"
    directory.mkdir()
    if kind == "recipe":
        (directory / "recipe.yaml").write_text("method: relora\nseed: 1\n")
    elif kind == "status":
        (directory / "status.json").write_text('{"state": "running", "job": 7}')
    elif kind == "model":
        (directory / "export").mkdir()
        (directory / "export" / "model.safetensors").write_text("weights")
    elif kind == "checkpoints":
        (directory / "checkpoints" / "step_00000100").mkdir(parents=True)
        (directory / "checkpoints" / "step_00000100" / "config.json").write_text("{}\n\n{}")
    elif kind == "metrics":
        (directory / "metrics.jsonl").write_text('{"loss": 1}\n')
    elif kind == "lock":
        (directory / "lock").write_text("poetry")
    return directory


@pytest.mark.parametrize("how", ["overwrite=true", "resume=auto", "resume=false"])
@pytest.mark.parametrize("kind", ["recipe", "status", "model", "checkpoints", "metrics", "lock"])
def test_our_names_with_other_contents_are_not_ours(tmp_path, refused, kind, how):
    directory = others(tmp_path, kind)
    printed = refused(directory, f"run_dir={directory}", how)
    assert "holds something that is not a run of relora_ds" in printed


def test_files_beside_a_run_do_not_keep_it_from_resuming(a_run, tmp_path):
    (a_run / "train.log").write_text("mine")
    assert not early_problems(recipe_of(a_run, "resume=auto"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "train.log").write_text("where a shell sends the output")
    assert not early_problems(recipe_of(tmp_path / "new", "resume=auto"))


@pytest.mark.parametrize("damage", ["", "{", "null", "[1]", "\udcff"])
def test_a_damaged_status_or_recipe_is_still_of_the_run(a_run, damage):
    for name in ("status.json", "recipe.yaml", "summary.json"):
        (a_run / name).write_bytes(damage.encode(errors="surrogateescape"))
    assert run_contents.look(a_run) == run_contents.Contents(True, True)
    assert not problems(recipe_of(a_run, "resume=auto")) and not problems(recipe_of(a_run, "overwrite=true"))
    assert "holds a run already" in problems(recipe_of(a_run))[0]


@pytest.mark.parametrize("how", ["resume=auto", "overwrite=true", "resume=false"])
@pytest.mark.parametrize("where", ["file", "file/run", "file/deep/run", "link"])
def test_a_run_directory_that_is_or_is_below_a_file(tmp_path, refused, where, how):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    printed = refused(tmp_path, f"run_dir={tmp_path / where}", how)
    assert f"run_dir: {tmp_path / where} cannot be written ({tmp_path / where.partition('/')[0]}: it is no" in printed


@pytest.mark.parametrize("where", ["disk", "disk/deep/run"])
def test_a_run_directory_on_a_disk_that_is_read_only(tmp_path, refused, where, monkeypatch):
    (tmp_path / "disk").mkdir()
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode, **options: (
            access(path, mode, **options) and not (Path(path) == tmp_path / "disk" and mode & os.W_OK)
        ),
    )
    assert "read-only" in refused(tmp_path, f"run_dir={tmp_path / where}")


def test_a_disk_that_turns_read_only_in_the_meantime(tmp_path, monkeypatch):
    def mkdir(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ValueError, match=rf"run_dir: {tmp_path}/run cannot be written .*Read-only file system"):
        Claim(recipe_of(tmp_path / "run"))

"""`overwrite=true` deletes a run, and nothing that anybody may miss or that the new run reads."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from relora_ds.checkpoint import store
from relora_ds.config import load_recipe
from relora_ds.training import run_contents
from relora_ds.training.run_directory import early_problems, problems
from tests.training.run_directories import OURS, SETTINGS, recipe_of
from tests.training.runs import lines, run, status


def test_a_deletion_that_is_interrupted_leaves_a_run(a_run, monkeypatch):
    """Whatever has gone by then: it is a run, nothing half of it passes for a checkpoint, and it can be overwritten, or
    resumed by the same job's next start.
    """
    (a_run / "status.json").write_text(json.dumps({**status(a_run), "state": "running"}))  # what is done first
    deleted = []

    class Stop(Exception):
        pass

    def stop_at(number, function):
        def call(path, *more, **options):
            if len(deleted) == number:
                raise Stop
            deleted.append(path)
            return function(path, *more, **options)

        return call

    number = 0
    while True:
        directory = a_run.with_name(f"copy_{number}")
        shutil.copytree(a_run, directory)
        deleted.clear()
        with monkeypatch.context() as patch:
            for name in ("unlink", "replace"):
                patch.setattr(os, name, stop_at(number, getattr(os, name)))
            with contextlib.suppress(Stop):
                run_contents.delete(directory)
                break
        found = run_contents.look(directory)
        assert found.is_run and not found.foreign
        for how in ("overwrite=true", "resume=auto"):
            assert not problems(recipe_of(directory, how))
        for checkpoint in store.directories(directory):
            assert not store.verify(checkpoint)
        number += 1
    assert number > 10


def test_what_overwrites_a_run_is_the_same_as_a_new_run(a_run, tmp_path):
    (a_run / "checkpoints" / "step_00000004.damaged").mkdir()
    before = sorted((a_run / "tensorboard").iterdir())
    run(a_run, *SETTINGS, "overwrite=true", "seed=3", world_size=1)
    assert {path.name for path in a_run.iterdir()} == OURS
    assert not set(before) & set((a_run / "tensorboard").iterdir())
    assert {path.name for path in (a_run / "checkpoints").iterdir()} == {
        "latest",
        "tokenizer",
        "step_00000003",
        "step_00000006",
    }
    assert [line["step"] for line in lines(a_run, "train")] == list(range(1, 7))
    assert "overwrite:" not in (a_run / "recipe.yaml").read_text()


def test_what_the_run_reads_is_not_deleted_first(a_run, tmp_path, refused, monkeypatch):
    (a_run / "checkpoints" / "tokenizer" / "ds.json").write_text("{}")
    (tmp_path / "link").symlink_to(a_run)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").symlink_to(a_run / "metrics.jsonl")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(a_run / "export" / "model.safetensors")
    shutil.copy(a_run / "export" / "config.json", tmp_path / "model" / "config.json")
    monkeypatch.setenv("RELORA_DS_CACHE", str(a_run / "checkpoints" / "cache"))
    printed = refused(
        tmp_path,
        f"run_dir={a_run}",
        "overwrite=true",
        f"deepspeed={tmp_path}/link/checkpoints/tokenizer/ds.json",
        f"init_from={tmp_path}/link",
        f"data.tokenizer={a_run}/export",
        "data.source=text",
        f"data.path={tmp_path}/texts/*.jsonl",
        f"data.validation={tmp_path}/texts",
        f"model.name_or_path={tmp_path}/model",
        "model.preset=null",
        config=str(a_run / "recipe.yaml"),
    )
    for field in (
        "--config",
        "deepspeed",
        "init_from",
        "data.tokenizer",
        "data.path",
        "data.validation",
        "model.name_or_path",
        "RELORA_DS_CACHE",
    ):
        assert f"  {field}: " in printed, field
    assert printed.count("which overwrite=true deletes") == 8


@pytest.mark.parametrize("name", [".", "link/recipe.yaml"])
def test_a_recipe_does_not_delete_itself(a_run, tmp_path, refused, name):
    """One that an older version stored says overwrite: true; so may one that extends it."""
    with (a_run / "recipe.yaml").open("a") as file:
        file.write("overwrite: true\n")
    (tmp_path / "link").symlink_to(a_run)
    config = a_run / "recipe.yaml" if name == "." else tmp_path / name
    assert "--config: " in refused(a_run, f"run_dir={a_run}", config=str(config))
    assert "resume=auto" in refused(a_run, f"run_dir={a_run}", "overwrite=false", config=str(config))
    (tmp_path / "mine.yaml").write_text(f"extends: {config}\nrun_dir: {a_run}\n")
    assert "holds a run already" in refused(a_run, config=str(tmp_path / "mine.yaml"))
    assert f"--config: {config} lies in" in refused(a_run, "overwrite=true", config=str(tmp_path / "mine.yaml"))


def test_a_stored_recipe_resumes_its_run(a_run):
    assert "overwrite:" not in (a_run / "recipe.yaml").read_text()
    assert not early_problems(load_recipe(a_run / "recipe.yaml", [f"run_dir={a_run}", "resume=auto"]))


def test_names_that_are_no_paths_are_not_taken_for_files_of_the_working_directory(a_run, monkeypatch):
    monkeypatch.chdir(a_run)
    assert not early_problems(recipe_of(Path("."), "overwrite=true"))

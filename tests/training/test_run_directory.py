"""What a run directory holds, and what may be done with it: nothing that anybody may miss is deleted or replaced."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from relora_ds.checkpoint import store
from relora_ds.checkpoint.find import ResumeError
from relora_ds.config import load_recipe
from relora_ds.train import main
from relora_ds.training import run_contents, run_directory
from relora_ds.training.lock import NAME, lock
from relora_ds.training.preflight import check
from relora_ds.training.requeue import FIRST_START
from relora_ds.training.run_directory import Claim, early_problems, problems
from relora_ds.training.trainer import Trainer
from tests.ranks import ranks
from tests.training.runs import AfterStep, died_before_its_first_checkpoint, lines, run, status

SETTINGS = (
    "train.steps=6",
    "warm_start_steps=0",
    "checkpoint.every=3",
    "relora.restart_every=4",
    "optim.warmup_steps=1",
    "relora.restart_warmup_steps=1",
    "eval.samples=0",
)
OURS = {"recipe.yaml", "status.json", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "export", NAME}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run; to be copied, not changed."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(directory, *SETTINGS, world_size=1)
    assert {path.name for path in directory.iterdir()} == OURS
    return directory


@pytest.fixture
def a_run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def snapshot(directory: Path) -> dict:
    return {
        path.relative_to(directory): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in directory.rglob("*")
    }


@pytest.fixture
def refused(capfd):
    """Start train.py; assert that it is refused before anything exists, and that `untouched` stays as it is."""

    def start(untouched: Path, *overrides: str, config: str = "tiny", code: int = 2) -> str:
        before = snapshot(untouched)
        assert main(["--config", config, *SETTINGS, *overrides]) == code
        assert snapshot(untouched) == before and not dist.is_initialized()
        return capfd.readouterr().err

    return start


def recipe_of(run_dir: Path, *overrides: str, config: str | Path = "tiny"):
    return load_recipe(config, [*SETTINGS, f"run_dir={run_dir}", *overrides])


# -- what is ours ----------------------------------------------------------------------------------------------------


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


# -- what overwrite deletes ------------------------------------------------------------------------------------------


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


# -- what the run is to read -----------------------------------------------------------------------------------------


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


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/step_00000003", "export", "tensorboard/new"])
@pytest.mark.parametrize("how", ["resume=auto", "overwrite=true", "seed=0"])
def test_a_run_inside_what_another_run_writes(a_run, refused, inside, how):
    message = refused(a_run, f"run_dir={a_run / inside}", how)
    assert f"lies in what the run {a_run} writes; choose a directory outside of it" in message


def test_a_run_beside_what_another_run_writes_is_that_runs_neighbour(a_run):
    assert problems(recipe_of(a_run / "seed1")) == []


def test_a_path_inside_the_run_directory_that_is_no_checkpoint_of_it(a_run, tmp_path, refused, monkeypatch):
    shutil.copytree(a_run, a_run / "old")
    (tmp_path / "link").symlink_to(a_run)
    monkeypatch.chdir(tmp_path)
    for path in (
        a_run / "old",
        "run/old",
        "run/../link/old/checkpoints/step_00000006",
        "link/export",
        "run/checkpoints/tokenizer",
        a_run / "old" / "checkpoints",
    ):
        for how in ("overwrite=true", "overwrite=false"):
            printed = refused(a_run, f"run_dir={a_run}", f"resume={path}", how)
            assert f"resume: {path} lies in run_dir {a_run}" in printed
    for path in (a_run, "run", "link/checkpoints/step_00000003", a_run / "checkpoints"):
        assert not early_problems(recipe_of(a_run, f"resume={path}"))
        assert "overwrite=true deletes" in refused(a_run, f"run_dir={a_run}", f"resume={path}", "overwrite=true")


def test_another_run_is_resumed_into_a_run_directory_only_by_overwriting_it(a_run, finished, refused):
    assert "holds a run already; set resume=auto" in refused(a_run, f"run_dir={a_run}", f"resume={finished}")
    run(a_run, *SETTINGS, f"resume={finished}/checkpoints/step_00000003", "overwrite=true", world_size=1)
    assert [line["step"] for line in lines(a_run, "train")] == [4, 5, 6]


@pytest.mark.parametrize("left", [{"summary.json"}, {"export"}, {"metrics.jsonl"}, {"status.json"}, OURS])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again(a_run, refused, left):
    shutil.rmtree(a_run / "checkpoints")
    for name in OURS - left - {"recipe.yaml", "checkpoints"}:
        shutil.rmtree(a_run / name) if (a_run / name).is_dir() else (a_run / name).unlink()
    printed = refused(a_run, f"run_dir={a_run}", "resume=auto")
    assert f"resume: auto, but {a_run} has no checkpoint left" in printed and "overwrite=true" in printed


def test_a_run_that_died_before_its_first_checkpoint_starts_again(a_run):
    died_before_its_first_checkpoint(a_run)
    assert not early_problems(recipe_of(a_run, "resume=auto"))
    later = [{**line, "step": line["step"] + 3} for line in lines(a_run, "phase")]
    with (a_run / "metrics.jsonl").open("a") as file:
        file.write('null\n{"kind": "tr')
    assert not early_problems(recipe_of(a_run, "resume=auto"))
    (a_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in later))
    assert "another run's checkpoint" in early_problems(recipe_of(a_run, "resume=auto"))[0]


# -- under the lock --------------------------------------------------------------------------------------------------


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


# -- a job that is started again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", FIRST_START)
@pytest.mark.parametrize("how", ["overwrite=true", "resume=false"])
def test_a_restarted_job_resumes_its_run(a_run, monkeypatch, variable, how):
    overrides = [*SETTINGS, f"run_dir={a_run}", how]
    again = {"AWS_BATCH_JOB_ATTEMPT": "2", "LSB_RESTART": "Y"}.get(variable, "1")
    monkeypatch.setenv(variable, FIRST_START[variable])
    assert check("tiny", [*overrides, "overwrite=true"]).recipe.overwrite
    monkeypatch.setenv(variable, again)
    plan = check("tiny", overrides)
    assert plan.recipe.resume == "auto" and not plan.recipe.overwrite
    (said,) = [warning for warning in plan.warnings() if warning.startswith("resume: ")]
    assert f"restarted ({variable}={again})" in said and ("not overwrite=true" in said) == (how == "overwrite=true")


def test_a_restarted_job_that_began_from_another_run(finished, a_run, tmp_path, monkeypatch):
    """It begins there again until it has saved a checkpoint of its own."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    new = [*SETTINGS, f"run_dir={tmp_path / 'new'}", f"resume={finished}"]
    assert check("tiny", new).recipe.resume == str(finished)
    shutil.copytree(a_run, tmp_path / "new")
    assert check("tiny", new).recipe.resume == "auto"
    died_before_its_first_checkpoint(tmp_path / "new")
    plan = check("tiny", new)
    assert plan.recipe.resume == str(finished) and not problems(plan.recipe)


@pytest.mark.parametrize("how", ["overwrite=true", "resume=false"])
def test_an_attempt_of_torchrun_after_a_refused_one_is_refused_too(a_run, tmp_path, monkeypatch, refused, how):
    (a_run / "notes.md").write_text("mine")
    for attempt in range(3):
        log = tmp_path / "logs" / f"attempt_{attempt}" / "0"
        log.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(log / "error.json"))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        assert "run_dir: " in refused(a_run, f"run_dir={a_run}", "optim.lr=1e-3", how)


def test_an_attempt_of_torchrun_after_a_refused_restart_is_a_restart(a_run, tmp_path, monkeypatch):
    """The first attempt trained; what could not be resumed for a while must not be overwritten by the third."""
    for attempt in (1, 2):
        (tmp_path / f"attempt_{attempt}" / "0").mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"attempt_{attempt}" / "0" / "error.json"))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        assert main(["--config", "tiny", *SETTINGS, f"run_dir={a_run}", "optim.lr=no"]) == 2
    assert check("tiny", [*SETTINGS, f"run_dir={a_run}", "overwrite=true"]).recipe.resume == "auto"


# -- places that cannot be written -----------------------------------------------------------------------------------


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

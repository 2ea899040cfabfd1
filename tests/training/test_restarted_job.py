"""What a start resumes: paths in a run directory, and the run of a job that is started again."""

import json
import shutil

import pytest

from relora_ds.train import main
from relora_ds.training.preflight import check
from relora_ds.training.requeue import FIRST_START
from relora_ds.training.run_directory import early_problems, problems
from tests.training.run_directories import OURS, SETTINGS, recipe_of
from tests.training.runs import died_before_its_first_checkpoint, lines, run


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

"""`log.to`: every logger gets the numbers of metrics.jsonl, none of them can stop a run, and only rank 0 writes."""

import contextlib
import importlib.util
import json
import logging
import sys
import types
from pathlib import Path

import pytest

from relora_ds.config import LogConfig, Recipe, RecipeError, load_recipe
from relora_ds.training import run_contents
from relora_ds.training.hooks import Hook
from relora_ds.training.hooks.loggers import LOGGERS, loggers_of
from relora_ds.training.metrics_log import MetricsLog, scalars_of
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from relora_ds.zero.teardown import release
from tests.ranks import ranks
from tests.training.runs import lines, status, train

SETTINGS = ["train.steps=12", "optim.warmup_steps=1", "eval.samples=0"]


def recipe_to(*names: str, run_dir: Path | None = None) -> Recipe:
    return Recipe(log=LogConfig(to=list(names)), run_dir=None if run_dir is None else str(run_dir))


def log_to(name: str, run_dir: Path, resume_step: int | None = None) -> MetricsLog:
    run_dir.mkdir(exist_ok=True)
    return MetricsLog(run_dir, loggers=loggers_of(recipe_to(name, run_dir=run_dir), run_dir, resume_step))


def write(log: MetricsLog, step: int) -> None:
    log.write("train", step=step, t=step, phase="relora", loss=4.0 - step, mfu=None, restarts=0)


def test_an_unknown_logger_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(RecipeError, match="log.to: .*wandbb.*wandb"):
        load_recipe("tiny", ["log.to=[wandbb]"])
    with pytest.raises(
        ValueError, match=r"log.to: 'wandbb' is no logger \(did you mean wandb.*choose from tensorboard, "
    ):
        loggers_of(recipe_to("wandbb"), tmp_path, None)


def test_numbers_have_one_name_everywhere():
    values = {"loss": 3.5, "mfu": None, "restarts": 1, "update_norms": {"a": 1.0}, "samples": ["text"]}
    assert scalars_of("train", values) == {
        "loss/train": 3.5,
        "progress/restarts": 1,
        "train/update_norms/a": 1.0,
    }
    assert scalars_of("restart", {"update_norms": {"layer.0": 2.0}}) == {"update_norm/layer.0": 2.0}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_package_that_is_missing_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog, name):
    for module in (name, f"{name}.tracking"):
        monkeypatch.setitem(sys.modules, module, None)
    log = log_to(name, tmp_path)
    for step in (1, 2, 3):
        write(log, step)
    log.close()
    assert len(caplog.records) == 1
    assert caplog.text.count(f"pip install {name}") == 1 and "log.to: " in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_logger_that_fails_is_left_alone_for_a_minute(tmp_path, monkeypatch, caplog):
    calls = []

    def init(**settings):
        calls.append(settings)
        raise OSError(28, "No space left on device")

    fake_wandb(monkeypatch, init)
    log = log_to("wandb", tmp_path)
    for step in (1, 2, 3):
        write(log, step)
    log.close()
    assert len(calls) == 1 and "Weights & Biases lacks events" in caplog.text
    assert "No space left on device" in caplog.text


# -- Weights & Biases ------------------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def fake_wandb(monkeypatch, init, has_key: bool = False) -> None:
    module = types.SimpleNamespace(init=init, Settings=dict, login=lambda prompt: has_key)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("mode", "has_key", "expected"),
    [(None, True, "offline"), ("online", True, "online"), ("online", False, "offline"), ("offline", True, "offline")],
)
def test_wandb_is_offline_unless_it_is_asked_to_be_online_and_has_a_key(
    tmp_path, monkeypatch, caplog, mode, has_key, expected
):
    seen, run = {}, FakeRun()

    def init(**settings):
        seen.update(settings)
        return run

    fake_wandb(monkeypatch, init, has_key)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    log = log_to("wandb", tmp_path / "run")
    write(log, 1)
    write(log, 2)
    log.close()
    assert seen["mode"] == expected and seen["name"] == "run" and seen["config"]["relora.r"] == 128
    assert run.logged[0] == {"loss/train": 3.0, "progress/restarts": 0, "step": 1} and run.finished
    assert caplog.text.count("there is no API key") == (mode == "online" and not has_key)


def test_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    for name in ("offline-run-20260101_120000-first", "run-20260102_120000-second"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    seen = []
    fake_wandb(monkeypatch, lambda **settings: seen.append(settings["id"]) or FakeRun())
    for resume_step in (12, -1, None):
        write(log_to("wandb", tmp_path, resume_step), 13)
    assert seen == ["second", None, None]


# -- the real packages, where they are installed -----------------------------------------------------------------------


def files_of(run_dir: Path, name: str) -> set[str]:
    return {path.name for path in (run_dir / name).rglob("*") if path.is_file()}


def values_in(name: str, run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) as the package itself reads them."""
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.absolute() / 'mlflow' / 'mlflow.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name("relora_ds").experiment_id])
        return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss/train")]
    import sqlite3

    with sqlite3.connect(run_dir / "trackio" / "relora_ds.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    return [(step, json.loads(metrics)["loss/train"]) for step, metrics in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_package_itself_takes_it_offline_and_continues_it(tmp_path, monkeypatch, caplog, name):
    if importlib.util.find_spec(name) is None:  # not imported: Trackio reads its directory then
        pytest.skip(f"{name} is not installed")
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_DIR", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)
    run_dir = tmp_path / "run"
    for resume_step, steps in ((-1, (1, 2)), (2, (3,))):
        log = log_to(name, run_dir, resume_step)
        for step in steps:
            write(log, step)
        log.close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert files_of(run_dir, name)
    if name == "wandb":
        runs = [path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")]
        assert len(runs) == 2 and len(set(runs)) == 1
    else:
        assert values_in(name, run_dir) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    (run_dir / "status.json").write_text(json.dumps({"state": "done", "step": 3, "exit_code": 0}))
    assert run_contents.look(run_dir).foreign == ()
    run_contents.delete(run_dir)
    assert not (run_dir / name).exists()


def train_with_loggers(overrides: list[str]) -> bool:
    """On a rank: train with a package that is missing; whether the logger's module was loaded here."""
    for name in ("wandb", "mlflow", "mlflow.tracking", "trackio"):
        sys.modules[name] = None
    for path in LOGGERS.values():
        sys.modules.pop(path.partition(":")[0], None)
    try:
        train("tiny", overrides)
        return "relora_ds.training.hooks.loggers.wandb" in sys.modules
    finally:
        for name in ("wandb", "mlflow", "mlflow.tracking", "trackio"):
            del sys.modules[name]


def test_only_rank_0_logs_and_a_run_needs_none_of_them(tmp_path):
    overrides = [f"run_dir={tmp_path / 'run'}", *SETTINGS, "log.to=[wandb,mlflow,trackio]"]
    assert ranks(2).run(train_with_loggers, overrides) == [True, False]
    assert status(tmp_path / "run")["state"] == "done" and len(lines(tmp_path / "run", "train")) == 12
    assert not (tmp_path / "run" / "tensorboard").exists()


class Mistake(Hook):
    """Fails on every rank in the middle of a run."""

    def on_step(self, run, step):
        if run.step == 6:
            raise KeyError("a mistake of the user")


def calls_of_packages(overrides: list[str], fails: bool) -> list[str]:
    """On a rank: train, to the end or not; returns the packages' starts and finishes of runs."""
    calls = []

    def package(name: str) -> types.SimpleNamespace:
        def init(*_, **__) -> FakeRun:
            calls.append(f"{name}.init")
            run = FakeRun()
            run.finish = lambda: calls.append(f"{name}.finish")
            run.log = lambda values, step=None: None
            return run

        return types.SimpleNamespace(init=init, Settings=dict)

    trainer = Trainer(check("tiny", overrides), [Mistake()] if fails else [])
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyError):
        patch.setenv("TRACKIO_DIR", "")  # the logger sets it
        for name in ("wandb", "trackio"):
            patch.setitem(sys.modules, name, package(name))
        trainer.fit()
    if fails:
        release(trainer.run.engine)
    return calls


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_rank_0_finishes_each_logger_once_however_the_run_ends(tmp_path, fails):
    overrides = [f"run_dir={tmp_path / 'run'}", *SETTINGS, "log.to=[wandb,trackio]"]
    first, second = ranks(2).run(calls_of_packages, overrides, fails)
    assert first == ["wandb.init", "trackio.init", "wandb.finish", "trackio.finish"] and second == []
    assert len(lines(tmp_path / "run", "train")) == (6 if fails else 12)

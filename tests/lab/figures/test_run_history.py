"""Reading runs: finished, going on, failed, alone, resumed; and what is no run."""

import json
import shutil

import numpy as np
import pytest

from relora_ds.lab.figures.run_history import read_runs
from tests.lab.figures.runs import RESTARTS, write_run


def test_a_finished_run(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "mine")])
    assert (run.name, run.method, run.state, run.verdict) == ("mine", "relora", "done", "relora ended well.")
    assert run.restarts == list(RESTARTS) and run.transitions == [40] and (run.trainable, run.total) == (600, 1200)
    assert run.train["step"].tolist() == list(range(1, 201))
    assert run.evaluations["step"].tolist() == [40, 80, 120, 160, 200]
    assert run.evaluations["tokens"].tolist() == [64 * step for step in (40, 80, 120, 160, 200)]
    assert run.evaluations["total_bytes_wire"].tolist() == [40_000 + 500 * n for n in (0, 40, 80, 120, 160)]
    assert run.has_traffic and run.samples == [("a <b>", " & c")]


def test_a_run_that_goes_on_and_one_that_failed(tmp_path):
    running = write_run(tmp_path / "running", steps=30, state="running")
    failed = write_run(tmp_path / "failed", steps=30, state="failed", reason="out of memory")
    first, second = read_runs([running, failed])
    assert (first.state, first.verdict, len(first.evaluations["step"])) == ("running", "", 0)
    assert (second.state, second.reason) == ("failed", "out of memory")


def test_a_run_whose_other_files_are_gone(tmp_path):
    directory = write_run(tmp_path / "r")
    for name in ("recipe.yaml", "status.json", "summary.json"):
        (directory / name).unlink()
    (run,) = read_runs([directory])
    assert (run.method, run.state, run.verdict) == ("unknown", "unknown", "")


def test_one_rank_sends_nothing(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "r", world_size=1)])
    assert not run.has_traffic


def test_a_cut_off_last_line_is_left_out(tmp_path):
    directory = write_run(tmp_path / "r")
    path = directory / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "train", "step": 201, "lo')
    assert read_runs([directory])[0].train["step"][-1] == 200


def test_losses_that_are_not_finite_are_nan(tmp_path):
    directory = write_run(tmp_path / "r")
    path = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    next(line for line in lines if line["kind"] == "train" and line["step"] == 9)["loss"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert np.flatnonzero(np.isnan(read_runs([directory])[0].train["loss"])).tolist() == [8]


def test_a_resume_is_no_switch(tmp_path):
    directory = write_run(tmp_path / "r")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    again = next(line for line in lines if '"phase"' in line and '"step": 40' in line and '"kind": "phase"' in line)
    (directory / "metrics.jsonl").write_text("\n".join([*lines, again]) + "\n")
    assert read_runs([directory])[0].transitions == [40]


def test_names_tell_runs_apart(tmp_path):
    one, two = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    assert [run.name for run in read_runs([one, two, tmp_path / "a" / ".." / "a" / "run"])] == ["a/run", "b/run"]


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match="no run; it has no metrics.jsonl"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="no run"):
        read_runs([tmp_path / "missing"])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="no training step"):
        read_runs([tmp_path])
    shutil.copy(write_run(tmp_path / "r", steps=0) / "metrics.jsonl", tmp_path)
    with pytest.raises(ValueError, match="no training step"):
        read_runs([tmp_path])

"""Processes of runs and of their islands: who starts, who is stopped, and what is told of a failure."""

import json
import re
import signal
import socket
import sys
import threading
import time

import pytest

from relora_ds.__main__ import main
from relora_ds.islands import requirement
from relora_ds.lab.experiments import budget, run_islands
from relora_ds.lab.experiments.runner import Runner
from relora_ds.lab.experiments.runs import Results, Run
from relora_ds.lab.experiments.suites import read_suite
from relora_ds.training.exit_codes import PREEMPTED, Preempted
from tests.islands.servers import joined

SPEED = 100.0  # tokens/s of one process


def run_of(suite: str, row: str, *overrides: str) -> Run:
    return Run.of(next(one for one in read_suite(suite, "tiny").rows if one.name == row), 0, overrides)


TWO = run_of("islands", "full rank, 2 islands, H 50")


class Stub(Runner):
    """Calls a function of the directory instead of a process, which returns the exit code."""

    def __init__(self, runs, call):
        super().__init__(runs)
        self.call, self.given = call, {}

    def execute(self, run, directory, *more, environment=None):
        self.given[directory.name] = (more, environment)
        return self.call(directory)


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Replace the Python of started processes by a shell script."""

    def replace(text: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return replace


def state(directory, name: str, **more) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "status.json").write_text(json.dumps({"state": name, "reason": "", **more}))


def test_all_islands_are_started_at_the_same_time(tmp_path):
    count = 40  # more than the workers that a pool has by itself
    together = threading.Barrier(count)

    def wait(directory):
        together.wait(30)
        state(directory, "done")
        return 0

    runner = Stub(tmp_path, wait)
    run = run_of("islands", "full rank, 2 islands, H 50", f"islands.count={count}")
    assert runner.train(run) is None
    (address,) = {more[0] for more, _ in runner.given.values()}
    assert re.fullmatch(r"islands\.address=127\.0\.0\.1:\d+", address)
    assert sorted(more[1:] for more, _ in runner.given.values()) == sorted(
        (f"islands.index={i}", "resume=auto") for i in range(count)
    )
    assert len({json.dumps(secret) for _, secret in runner.given.values()}) == 1


def test_a_run_without_islands_has_no_server(tmp_path):
    runner = Stub(tmp_path, lambda directory: state(directory, "done") or 0)
    run = run_of("main", "full rank")
    assert runner.train(run) is None
    assert runner.given == {run.name: (("resume=auto",), None)} and not (tmp_path / run.name / "rounds").exists()


def test_islands_are_served_with_a_secret_of_this_start(tmp_path):
    secrets, before = [], threading.active_count()
    for _ in range(2):
        with run_islands.serving(tmp_path) as ((address,), environment):
            (secret,) = environment.values()
            address = address.removeprefix("islands.address=")
            with joined(f"tcp://{address}", "a", "b", secret=secret):
                pass
            secrets.append(secret)
    assert secrets[0] != secrets[1] and threading.active_count() == before
    assert (tmp_path / "server.log").is_file() and (tmp_path / "rounds").is_dir()
    host, port = address.split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), 1)


def test_the_other_islands_of_one_that_fails_are_stopped(tmp_path, python):
    python('case "$*" in *islands.index=1*) echo "error: no memory"; exit 3;; esac\nexec sleep 60')
    runner = Runner(tmp_path / "runs")
    directories = run_islands.directories(runner.directory(TWO), 2)
    codes = runner._execute_all(TWO, directories)
    assert list(codes.items()) == [(directories[1], 3), (directories[0], -signal.SIGTERM)]
    assert "no memory; see " in runner.train(TWO) and not runner.stopping.is_set()


def test_an_island_that_cannot_be_started_does_not_keep_the_others_waiting(tmp_path):
    stopped, told = threading.Event(), []

    def start(directory):
        if directory.name == "island-1":
            raise OSError("no space left")
        told.append(stopped.wait(5))
        return -signal.SIGTERM

    runner = Stub(tmp_path, start)
    runner._terminate = lambda directories: stopped.set()
    with pytest.raises(OSError, match="no space left"):
        runner.train(TWO)
    assert told == [True]


def test_an_island_that_starts_after_another_failed_is_stopped_too(tmp_path, python):
    python("exec sleep 10")
    runner = Runner(tmp_path)
    runner._terminate([tmp_path / "late"])
    assert runner.execute(TWO, tmp_path / "late") == -signal.SIGTERM


def test_stopped_while_it_runs(tmp_path, python):
    python("exec sleep 60")
    runner = Runner(tmp_path / "runs")
    timer = threading.Timer(0.5, runner.stop)
    timer.start()
    with pytest.raises(Preempted):
        runner.train(TWO)
    assert not runner._processes
    with pytest.raises(Preempted, match="was not started"):
        runner.execute(TWO, tmp_path / "runs/more")


def test_the_ranks_of_a_launcher_that_dies_of_the_signal_save_themselves(tmp_path, python):
    saved = tmp_path / "saved"
    rank = f"""trap 'sleep 0.5; echo > "{saved}"; exit 75' TERM; : > "{tmp_path}/ready"; while :; do sleep 0.05; done"""
    (tmp_path / "rank").write_text(rank)
    python(f'sh "{tmp_path}/rank" &\nexec sleep 60')
    runner = Runner(tmp_path / "runs", num_gpus=2)

    def stop():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        runner.stop()

    threading.Thread(target=stop).start()
    assert runner.execute(TWO, tmp_path / "runs/launched") == -signal.SIGTERM
    assert saved.exists(), "the runner was back before the rank had saved itself"


@pytest.mark.parametrize("code", [3, 0])  # the deepspeed launcher may return 0 for a rank that failed
def test_the_status_of_an_earlier_start_hides_no_failure(tmp_path, code):
    runner = Stub(tmp_path, lambda directory: code if directory.name == "island-1" else 0)
    first, second = run_islands.directories(runner.directory(TWO), 2)
    for directory in (first, second):
        state(directory, "preempted", reason="it was asked to stop")
        directory.with_name(f"{directory.name}.log").write_text("\n$ train\nerror: the recipe changed\n")
    runner.call = lambda directory: state(first, "done") or 0 if directory == first else code
    assert "the recipe changed; see " in runner.train(TWO) and not runner.stopping.is_set()


@pytest.mark.parametrize("code", [PREEMPTED, 0])
def test_an_island_that_is_preempted_again_stops_all(tmp_path, code):
    runner = Stub(tmp_path, lambda directory: state(directory, "preempted", time=2) or code)
    for directory in run_islands.directories(runner.directory(TWO), 2):
        state(directory, "preempted", time=1)
    with pytest.raises(Preempted):
        runner.train(TWO)
    assert runner.stopping.is_set()


def test_runs_at_the_same_time_have_ports_of_their_own(tmp_path, python):
    python("exit 0")
    runner = Runner(tmp_path / "runs", num_gpus=2)
    for name in ("a", "b"):
        assert runner.execute(TWO, tmp_path / "runs" / name) == 0
    found = [
        re.search(r"runner --num_gpus 2 --master_port (\d+) --module relora_ds.train ", log.read_text()).group(1)
        for log in (tmp_path / "runs").glob("*.log")
    ]
    assert len(set(found)) == 2 and "29500" not in found


def test_pyzmq_is_asked_for_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(requirement, "find_spec", lambda name: None)
    monkeypatch.setattr(Runner, "execute", lambda *_, **__: pytest.fail("something was trained"))
    words = ["reproduce", "islands", "--seeds", "1", "--runs", str(tmp_path), "--rows"]
    assert main([*words, "full rank", TWO.row.name]) != 0
    assert "they need pyzmq" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main([*words, TWO.row.name, "--dry-run"]) == 0
    run_islands.check([run_of("islands", "full rank").recipe])


def test_a_trial_and_a_result_tell_the_same_speed_of_islands(tmp_path):
    together = threading.Barrier(2)

    def train(directory):
        together.wait(30)
        directory.mkdir(parents=True)
        lines = [
            {"kind": "train", "step": i, "phase": "full", "tokens_per_s": SPEED} for i in range(budget.TRIAL_STEPS)
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    measured = budget.trial(Stub(tmp_path / "runs", train))(TWO)
    assert measured == 2 * SPEED
    results = Results(tmp_path / "results")
    (before,) = budget.budget([TWO], results, lambda _: measured)
    island = TWO.tokens / 2
    results.write(TWO, {"tokens": TWO.tokens, "seconds": island / SPEED})
    (after,) = budget.budget([TWO], results, None)
    assert before.tokens_per_s == after.tokens_per_s and before.hours == pytest.approx(island / SPEED / 3600)


def test_an_island_that_fails_fails_the_trial(tmp_path, python):
    python('case "$*" in *island-1*) exit 3;; esac')
    with pytest.raises(ValueError, match="a trial of 8 steps failed: exit code 3; see .*island-1.log"):
        budget.trial(Runner(tmp_path / "runs"))(TWO)

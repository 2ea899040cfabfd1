"""Asked to stop, or standing still: what a run does, and what it leaves."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from relora_ds import train
from relora_ds.checkpoint import store
from relora_ds.training.exit_codes import GuardError, Preempted
from relora_ds.training.hooks import watchdog
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.faults.kills import Mortal, require_equal
from tests.ranks import ranks
from tests.training.runs import AfterStep, lines, losses, run, status

SETTINGS = ["eval.samples=0", "checkpoint.every=null", "precision=bf16"]


def train_and_signal(overrides: list[str], number: int, rank: int, step: int) -> tuple[str, str, int]:
    """On a rank: train; `rank` gets a signal during `step`. Returns what ended it, what is said, and the last step."""
    before = signal.SIG_DFL

    def signalled(state):
        if state.step == step - 1 and dist.get_rank() == rank:
            os.kill(os.getpid(), number)

    trainer = Trainer(check("tiny", overrides), [AfterStep(signalled)])
    try:
        trainer.fit()
    except (Preempted, GuardError) as error:
        return type(error).__name__, str(error), trainer.run.step
    finally:
        assert signal.getsignal(number) == signal.SIG_IGN  # a second one would hide the first one's outcome
        for each in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, before)
    return "it came to its end", "", trainer.run.step


@pytest.mark.parametrize(
    ("number", "rank", "step"),
    [
        pytest.param(signal.SIGTERM, 1, 16, marks=pytest.mark.slow),
        (signal.SIGUSR1, 0, 10),
        pytest.param(signal.SIGTERM, 0, 3, marks=pytest.mark.slow),
    ],
    ids=["cycle", "transition", "warm_start"],
)
def test_one_rank_hears_and_all_stop_at_the_same_step(tmp_path, number, rank, step):
    settings = [*SETTINGS, "train.steps=24"]
    run(tmp_path / "whole", *settings)
    for _, said, last in ranks(2).run(train_and_signal, [f"run_dir={tmp_path / 'r'}", *settings], number, rank, step):
        assert step <= last <= step + 2 and f"saved after step {last}" in said
    (directory,) = store.directories(tmp_path / "r")
    assert directory.name == f"step_{last:08d}" and store.verify(directory) == []
    run(tmp_path / "r", *settings, "resume=auto")
    require_equal(tmp_path / "r", tmp_path / "whole")


def test_at_a_step_that_is_saved_anyway_it_is_not_saved_twice(tmp_path):
    ranks(2).run(train_and_signal, [f"run_dir={tmp_path / 'r'}", *SETTINGS, "checkpoint.every=1"], signal.SIGTERM, 0, 7)
    saved = [line["step"] for line in lines(tmp_path / "r", "checkpoint")]
    assert len(saved) == len(set(saved)) and saved[-1] == max(losses(tmp_path / "r"))


def no_space(*_):
    raise OSError(28, "No space left on device")


def train_and_signal_on_a_full_disk(*arguments) -> tuple[str, str, int]:
    with mock.patch("relora_ds.checkpoint.rank_files.save_file", no_space):
        return train_and_signal(*arguments)


def test_what_could_not_be_saved_is_not_called_saved(tmp_path):
    for kind, said, _ in ranks(2).run(
        train_and_signal_on_a_full_disk, [f"run_dir={tmp_path / 'r'}", *SETTINGS], signal.SIGTERM, 1, 16
    ):
        assert kind == "GuardError" and "could not be saved" in said and said.endswith("Nothing was saved")


def train_and_die(overrides: list[str], rank: int) -> None:
    """On a rank: train; `rank` dies in step 14. The other one writes down what it says."""

    def dying(state):
        if state.step == 13 and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(check("tiny", overrides), [AfterStep(dying)])
    try:
        trainer.fit()
    except RuntimeError as error:
        (trainer.run.run_dir / "said").write_text(str(error))


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, ", which keeps the store that the ranks met at, does not answer"),
        pytest.param(1, " does not answer", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_is_named(tmp_path, rank, words):
    """Rank 0 takes the store with it, of which the others ask who is silent."""
    said = tmp_path / "r" / "said"
    pair = Mortal(2, mourning=120, until=lambda: said.is_file() and said.stat().st_size > 0)
    with pytest.raises(AssertionError, match="it died"):
        pair.run(train_and_die, [f"run_dir={tmp_path / 'r'}", *SETTINGS, "guard.watchdog_seconds=8"], rank)
    assert said.read_text().endswith(f"; rank {rank} on {os.uname().nodename}{words}")


def watch_and_die(said: Path) -> None:
    """On a rank: rank 0 dies, and the other one's main thread never hears of it."""
    on_stuck = lambda message, code: said.write_text(f"{code} {message}")  # noqa: E731
    with mock.patch.object(watchdog, "_GRACE_S", 0.1):
        watchdog.Watchdog(60, lambda: "step 5", on_stuck)
        dist.barrier()
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


def test_where_rank_0_has_died_nothing_can_hang(tmp_path):
    pair = Mortal(2, mourning=60)
    pair._until = lambda: pair._workers[1][0].exitcode is not None
    with pytest.raises(AssertionError, match="it died"):
        pair.run(watch_and_die, tmp_path / "said")
    assert pair.exit_codes[1] == 1
    assert (tmp_path / "said").read_text() == (
        f"1 rank 0 on {os.uname().nodename}, which keeps the store that the ranks met at, has died, at step 5"
    )


def train_and_freeze(overrides: list[str], rank: int) -> None:
    """On a rank: train; `rank` is stopped in its tracks during step 14."""

    def frozen(state):
        if state.step == 13 and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGSTOP)

    trainer = Trainer(check("tiny", overrides), [AfterStep(frozen)])
    trainer.fit()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_stands_still_is_named_and_the_others_end(tmp_path, rank):
    pair = Mortal(2)
    started = time.monotonic()
    with pytest.raises(AssertionError, match="it died"):
        pair.run(train_and_freeze, [f"run_dir={tmp_path / 'r'}", *SETTINGS, "guard.watchdog_seconds=8"], rank)
    assert pair.exit_codes[1 - rank] == 3
    assert time.monotonic() - started < 240
    said = status(tmp_path / "r")
    assert (said["state"], said["exit_code"]) == ("failed", 3)
    assert said["reason"].startswith(
        f"guard.watchdog_seconds: no progress for 8 s at step 13; rank {rank} on {os.uname().nodename} does not answer"
    )


def linger(overrides: list[str], rank: int) -> None:
    """On a rank: train; `rank` does not come to step 14, but lives."""

    def lingering(state):
        if state.step == 13 and dist.get_rank() == rank:
            time.sleep(60)

    trainer = Trainer(check("tiny", overrides), [AfterStep(lingering)])
    trainer.fit()


@pytest.mark.slow
def test_a_rank_that_lives_but_does_not_come_is_behind_the_others(tmp_path):
    pair = Mortal(2)
    with pytest.raises(AssertionError, match="it died"):
        pair.run(linger, [f"run_dir={tmp_path / 'r'}", *SETTINGS, "guard.watchdog_seconds=8"], 1)
    assert json.loads((tmp_path / "r" / "status.json").read_text())["reason"].endswith("is behind the others")
    assert "rank 1 on" in status(tmp_path / "r")["reason"] and "rank 0 on" not in status(tmp_path / "r")["reason"]


@pytest.mark.slow
def test_a_slow_step_is_no_standstill(tmp_path):
    """Every step takes longer than the threads' rhythm; the run comes to its end."""
    ranks(2).run(dawdle, [f"run_dir={tmp_path / 'r'}", *SETTINGS, "guard.watchdog_seconds=24", "train.steps=14"])
    assert status(tmp_path / "r")["state"] == "done"


def dawdle(overrides: list[str]) -> None:
    slow = AfterStep(lambda state: time.sleep(7 if state.step in (3, 11) else 0))
    Trainer(check("tiny", overrides), [slow]).fit()


def interrupt(overrides: list[str]) -> int:
    def press(state):
        raise KeyboardInterrupt

    return train.run("tiny", overrides, [AfterStep(press)])


def test_ctrl_c_is_said_in_one_line(tmp_path):
    assert ranks(1).run(interrupt, [f"run_dir={tmp_path / 'r'}", *SETTINGS]) == [1]
    said = status(tmp_path / "r")
    assert (said["state"], said["exit_code"]) == ("failed", 1) and said["reason"].startswith("interrupted, and nothing")

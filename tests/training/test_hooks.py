"""Hooks of a user: what they hear, which are refused, and what their mistakes do to a run."""

import contextlib
import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from relora_ds import Hook, train
from relora_ds.config import RecipeError
from relora_ds.training import exit_codes
from relora_ds.training.hooks.hook import EVENTS
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.faults.kills import Mortal
from tests.ranks import ranks
from tests.training.runs import status

SETTINGS = ["train.steps=22", "checkpoint.every=20", "eval.samples=0", "log.every=5"]


class Listener(Hook):
    """Attributes: heard: the events but steps, each with the run's step; losses: figures of the steps."""

    def __init__(self):
        self.heard, self.losses, self.inside = [], {}, []

    @contextlib.contextmanager
    def around_step(self, run):
        before = run.engine.t
        yield
        self.inside.append(run.engine.t - before)

    def on_step(self, run, step):
        if step.figures is not None:
            self.losses[run.step] = step.figures["loss"]


def _listen(event):
    def hear(self, run, *args, **kwargs):
        self.heard.append((event, run.step))

    return hear


for _event in set(EVENTS) - {"on_step", "around_step"}:
    setattr(Listener, _event, _listen(_event))


def listen(overrides: list[str]) -> tuple:
    hook = Listener()
    Trainer(check("tiny", overrides), [hook]).fit()
    return hook.heard, hook.losses, hook.inside


def test_hooks_hear_of_everything_in_order_on_every_rank(tmp_path):
    for heard, losses, inside in ranks(2).run(listen, [f"run_dir={tmp_path / 'run'}", *SETTINGS]):
        written = [entry for entry in heard if entry[0] == "on_checkpoint"]
        assert [entry for entry in heard if entry[0] != "on_checkpoint"] == [
            ("on_start", 0),
            ("on_begin", 0),
            ("on_phase", 0),
            ("on_eval", 10),
            ("on_phase_end", 10),
            ("on_phase", 10),
            ("on_restart", 20),
            ("on_eval", 20),
            ("on_eval", 22),
            ("on_phase_end", 22),
            ("on_end", 22),
            ("close", 22),
        ]
        assert len(written) == 2 and written[-1] == ("on_checkpoint", 22)
        assert list(losses) == [5, 10, 15, 20, 21, 22] and all(loss > 0 for loss in losses.values())
        assert inside == [1] * 22


class Misspelt(Hook):
    def on_evaluation(self, run, evaluation, samples):
        pass


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("console", "hooks: 'console' is no hook; pass an instance of a subclass of relora_ds.Hook"),
        (Listener, "hooks: Listener is a class; pass an instance, Listener()"),
        (Misspelt(), r"hooks: Misspelt.on_evaluation is no event \(did you mean on_eval.*; the events are on_start, "),
    ],
)
def test_what_is_no_hook_is_refused(tmp_path, hook, words, capsys):
    overrides = [f"run_dir={tmp_path / 'run'}", *SETTINGS]
    plan = check("tiny", overrides)
    with pytest.raises(RecipeError, match=words):
        Trainer(plan, [hook])
    assert train.run("tiny", overrides, [hook]) == exit_codes.RECIPE
    assert "hooks: " in capsys.readouterr().err and not (tmp_path / "run").exists()


class Mistake(Hook):
    """Fails on one rank in the middle of a run."""

    def __init__(self, rank: int):
        self._rank = rank

    def on_step(self, run, step):
        if run.step == 13 and dist.get_rank() == self._rank:
            raise KeyError("a mistake of the user")


def train_with_a_mistake(overrides: list[str], rank: int, out: Path) -> None:
    """On a rank: what a script with a hook does."""
    with open(out / f"rank_{dist.get_rank()}", "w", buffering=1) as file, contextlib.redirect_stderr(file):
        code = train.run("tiny", overrides, [Mistake(rank)])
    os._exit(code)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_exception_in_a_hook_ends_the_run_on_all_ranks_with_its_traceback(tmp_path, rank):
    pair, started = Mortal(2), time.monotonic()
    pair._mourning, pair._until = 120, lambda: all(process.exitcode is not None for process, _ in pair._workers)
    with pytest.raises(AssertionError, match="it died"):
        pair.run(train_with_a_mistake, [f"run_dir={tmp_path / 'run'}", *SETTINGS], rank, tmp_path)
    assert pair.exit_codes == [exit_codes.ERROR, exit_codes.ERROR] and time.monotonic() - started < 240
    said = (tmp_path / f"rank_{rank}").read_text()
    assert "Traceback" in said and ", in on_step" in said and "a mistake of the user" in said
    assert status(tmp_path / "run")["state"] == "failed"


class Leaves(Hook):
    def on_step(self, run, step):
        if run.step == 13:
            raise SystemExit(0)


def leave_in_a_hook(overrides: list[str]) -> int:
    return train.run("tiny", overrides, [Leaves()])


def test_a_hook_that_exits_leaves_no_run_that_seems_to_train_or_to_be_done(tmp_path):
    assert ranks(1).run(leave_in_a_hook, [f"run_dir={tmp_path / 'run'}", *SETTINGS]) == [exit_codes.ERROR]
    said = status(tmp_path / "run")
    assert said["state"] == "failed" and "sys.exit(0) in a hook; SIGTERM" in said["reason"]


def test_a_hook_that_cannot_close_does_not_matter(tmp_path):
    assert ranks(1).run(fail_to_close, [f"run_dir={tmp_path / 'run'}", *SETTINGS]) == [True]
    assert status(tmp_path / "run")["state"] == "done"


def fail_to_close(overrides: list[str]) -> bool:
    class Stuck(Hook):
        def close(self, run):
            raise OSError("it is stuck")

    last = Listener()
    Trainer(check("tiny", overrides), [last, Stuck()]).fit()
    return last.heard[-1][0] == "close"


def test_exit_codes_are_the_contract():
    names = ("DONE", "ERROR", "RECIPE", "GUARD", "RESUME", "PREEMPTED")
    assert [getattr(exit_codes, name) for name in names] == [0, 1, 2, 3, 4, 75]

"""An island that is asked to stop while it waits for others."""

import os
import signal
from unittest import mock

import torch.distributed as dist

import relora_ds.train
from relora_ds.islands.client import Link
from relora_ds.islands.secret import VARIABLE
from relora_ds.training import exit_codes
from tests.exchange.cases import worlds
from tests.islands.servers import SECRET, serving
from tests.training.runs import lines, status

PROMPTLY_S = 240  # the others are waited for ten minutes


def run(overrides: list[str], asked: int) -> tuple[int, bool]:
    """On a rank: the exit code of a run, and whether SIGTERM is ignored after it.

    asked: a rank that hears SIGTERM while it waits for a decision.
    """
    os.environ[VARIABLE] = SECRET
    real = Link.decision

    def decision(link, round):
        if dist.get_rank() == asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(link, round)

    with mock.patch.object(Link, "decision", decision):
        code = relora_ds.train.run("tiny", overrides)
    return code, signal.signal(signal.SIGTERM, signal.SIG_DFL) == signal.SIG_IGN


def test_it_stops_without_having_exchanged(tmp_path):
    with serving(tmp_path / "rounds", timeout_s=600) as server, worlds(2) as (world,):
        islands = ["islands.count=2", "islands.sync_every=5", f"islands.address={server.address}"]
        overrides = [f"run_dir={tmp_path / 'run'}", "eval.samples=0", "train.steps=20", "checkpoint.every=3", *islands]
        ended = world.run(run, overrides, 1, timeout=PROMPTLY_S)
        assert ended == [(exit_codes.PREEMPTED, True)] * 2
        said = status(tmp_path / "run")
        assert (said["state"], said["exit_code"]) == ("preempted", exit_codes.PREEMPTED)
        assert said["reason"] == (
            "asked to stop while exchange 1 waited for other islands; resume=auto resumes from step_00000003 and makes "
            "it good"
        )
        assert lines(tmp_path / "run", "sync") == []

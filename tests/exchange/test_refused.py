"""One rank of an island that the server refuses: all of its ranks end, and say why."""

import os
from unittest import mock

import pytest
import torch.distributed as dist

import relora_ds.train
from relora_ds import Islands, IslandsConfig, initialize
from relora_ds.islands.client import Link
from relora_ds.islands.refusals import LinkError, LinkRefused
from relora_ds.islands.secret import VARIABLE
from relora_ds.training import exit_codes
from tests import small_models
from tests.exchange import cases
from tests.exchange.cases import worlds
from tests.islands.servers import SECRET, serving
from tests.training.runs import status

REASON = "the update is another one; start this island again"
PROMPTLY_S = 240  # a watchdog waits for half an hour


def failing(method: str, rank: int, error: type[Exception]):
    """Have a method of one rank's link fail, and of no other."""
    real = getattr(Link, method)

    def fails(*args, **kwargs):
        if dist.get_rank() == rank:
            raise error(REASON)
        return real(*args, **kwargs)

    return mock.patch.object(Link, method, fails)


def own_loop(address: str, method: str, rank: int, error: type[Exception]) -> str:
    """On a rank: what becomes of an island."""
    with failing(method, rank, error):
        try:
            cases.train(0, address, 1)
        except (LinkRefused, LinkError) as found:
            return f"{type(found).__name__}: {found}"
    return "it went on"


@pytest.mark.parametrize(
    ("method", "rank", "error"),
    [
        ("contribute", 1, LinkRefused),
        ("agree", 1, LinkError),
        pytest.param("join", 1, LinkRefused, marks=pytest.mark.slow),
        pytest.param("join", 0, LinkRefused, marks=pytest.mark.slow),
        pytest.param("decision", 1, LinkRefused, marks=pytest.mark.slow),
        pytest.param("decision", 1, OSError, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_of_a_loop_hear_of_it(method, rank, error, tmp_path):
    with serving(tmp_path) as server, worlds(2) as (world,):
        found = world.run(own_loop, server.address, method, rank, error, timeout=PROMPTLY_S)
    raised = "LinkError" if error is LinkError else "LinkRefused"
    assert found == [f"{raised}: islands: rank {rank}: {error.__name__}: {REASON}"] * 2


def test_an_engine_that_could_not_exchange_is_not_built():
    islands = Islands(IslandsConfig(count=2, address="127.0.0.1:5555"), secret=SECRET)
    with mock.patch("relora_ds.zero.initialize.init_distributed") as begun:
        with pytest.raises(ValueError, match="lr: .*\n.*islands.sync_every: None, and there are no restarts"):
            initialize(small_models.llama(), "zero1", total_steps=10, islands=islands)
        begun.assert_not_called()


def run(overrides: list[str]) -> int:
    """On a rank: the exit code of a run."""
    os.environ[VARIABLE] = SECRET
    with failing("contribute", 1, LinkRefused):
        return relora_ds.train.run("tiny", overrides)


def test_a_run_ends_on_all_ranks(tmp_path):
    with serving(tmp_path / "rounds") as server, worlds(2) as (world,):
        islands = ["islands.count=1", "islands.sync_every=5", f"islands.address={server.address}"]
        codes = world.run(run, [f"run_dir={tmp_path / 'run'}", "eval.samples=0", *islands], timeout=PROMPTLY_S)
    assert codes == [exit_codes.ERROR] * 2
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["exit_code"], ended["step"]) == ("failed", exit_codes.ERROR, 4)
    assert ended["reason"].endswith(f"islands: rank 1: LinkRefused: {REASON}")

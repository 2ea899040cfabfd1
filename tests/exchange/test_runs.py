"""Runs of recipes as islands, from tokens to the export."""

import functools
import os

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.config import methods_of
from relora_ds.islands.secret import VARIABLE
from relora_ds.planning.cost import cost
from relora_ds.planning.network import network_of
from relora_ds.training.hooks import Hook
from relora_ds.training.preflight import check, resolve
from relora_ds.training.trainer import Trainer
from tests.exchange.cases import at_once, worlds
from tests.islands.servers import SECRET, serving
from tests.training.runs import lines, losses, status

ISLANDS = ("islands.count=2", "islands.sync_every=5", "islands.compress=int8", "eval.samples=0", "checkpoint.every=4")


class Killed(Exception):
    """Stands for a signal that leaves no time."""


class KillAt(Hook):
    def __init__(self, step: int):
        self._step = step

    def on_step(self, run, step) -> None:
        if run.step >= self._step:  # an island that is late leaves steps out
            raise Killed


def train(overrides: list[str], kill_at: int | None = None) -> dict | None:
    """On a rank: train the recipe `tiny` to its end; None where it was killed."""
    os.environ[VARIABLE] = SECRET
    try:
        return Trainer(check("tiny", overrides), [] if kill_at is None else [KillAt(kill_at)]).fit()
    except Killed:
        return None


def island(world, index: int, directory, address: str, *more: str, **how):
    own = [f"run_dir={directory}/{index}", f"islands.index={index}", f"islands.address={address}"]
    return functools.partial(world.run, train, [*own, *ISLANDS, *more], **how)


def planned_bytes() -> list[int | None]:
    """Return what `relora check` says of an exchange, by phase."""
    resolved = resolve("tiny", [*ISLANDS, "islands.address=host:5555"], 1, to_run=False)
    config, _ = network_of(resolved.recipe)
    return [cost(resolved, method, config).exchange for method in methods_of(resolved.recipe)]


def exported(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "export" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow  # the one below exports one model too
def test_two_islands_export_one_model(tmp_path):
    with serving(tmp_path / "rounds") as server, worlds(1, 2) as found:
        summaries = at_once(*(island(world, i, tmp_path, server.address) for i, world in enumerate(found)))
    first, second = (lines(tmp_path / str(i), "sync") for i in range(2))
    # Every 5 steps of the warm start, at the restarts, and at the end.
    assert [line["step"] for line in first] == [line["step"] for line in second] == [5, 10, 20, 30, 40]
    assert [line["round"] for line in first] == [1, 2, 3, 4, 5]
    assert not any(line["missing"] for line in first)
    assert all(line["bytes_received"] == line["bytes_sent"] for line in first + second)
    assert same(exported(tmp_path / "0"), exported(tmp_path / "1"))
    assert summaries[0][0]["val_loss"] == pytest.approx(summaries[1][0]["val_loss"], rel=1e-6)
    assert losses(tmp_path / "0")[1] != losses(tmp_path / "1")[1], "they train on other sequences"
    assert losses(tmp_path / "0")[40] < losses(tmp_path / "0")[1] - 0.2


def test_killed_ones_come_back(tmp_path):
    """Island 1 dies in the warm start, and is back when the other one has restarted, which then dies too."""
    with serving(tmp_path / "rounds", timeout_s=0.5) as server, worlds(1, 2) as (first, second):
        both = (first, 0, tmp_path, server.address), (second, 1, tmp_path, server.address)
        assert at_once(island(*both[0], kill_at=25), island(*both[1], kill_at=7)) == [[None], [None, None]]
        assert lines(tmp_path / "0", "sync")[-1]["missing"] == ["0001"]
        assert status(tmp_path / "0")["reason"].endswith("took place without 0001")
        at_once(*(island(*one, "resume=auto") for one in both))
    assert same(exported(tmp_path / "0"), exported(tmp_path / "1"))
    made_good = [line["round"] for line in lines(tmp_path / "1", "sync")]
    assert made_good == [1, 2, 3, 4, 5]
    by_itself = lines(tmp_path / "0", "sync")[1:3]  # the last one of the warm start, and the first restart
    assert [line["bytes_sent"] for line in by_itself] == planned_bytes()
    one, other = (losses(tmp_path / str(i)) for i in range(2))
    both_took = one.keys() & other.keys()
    assert both_took and all(one[step] != other[step] for step in both_took), "they train on other sequences"


def test_steps_that_are_made_good_count(tmp_path):
    """Both die after an exchange and resume before it: what they gave to it is not trained again."""
    more = ["train.steps=16", "islands.sync_every=5", "relora.restart_every=8", "warm_start_steps=8"]
    with serving(tmp_path / "rounds") as server, worlds(1, 1) as found:
        both = [(world, i, tmp_path, server.address, *more) for i, world in enumerate(found)]
        assert at_once(*(island(*one, kill_at=7) for one in both)) == [[None], [None]]
        summaries = at_once(*(island(*one, "resume=auto") for one in both))
    for i, [summary] in enumerate(summaries):
        assert [line["made_good_steps"] for line in lines(tmp_path / str(i), "sync")] == [1, 0, 0]  # of step 5
        tokens = {line["step"]: line["tokens"] for line in lines(tmp_path / str(i), "train")}
        assert summary["tokens"] == tokens[16] == 4 * tokens[4]

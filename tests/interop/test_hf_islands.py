"""Trainers that are islands: they end with the same bits, and their steps are those of the engine."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from relora_ds import IslandsConfig
from relora_ds.interop.hf_islands import NothingLeftError, StepsOfIsland
from relora_ds.islands.secret import VARIABLE
from tests.exchange.cases import at_once, worlds
from tests.interop.trainers import SAVED_AT, STEPS, TRAIN_ROWS, made_trainer, said, trainers_run
from tests.islands.servers import SECRET, serving
from tests.ranks import ranks

COUNT = 2
HOW = ({"kind": "subclass", "stage": 1}, {"kind": "callback", "stage": 3})  # of one rank, and of two


def train(directory: str, index: int, address: str, **how) -> dict:
    """On a rank: an island's run, on every second row."""
    os.environ[VARIABLE] = SECRET
    islands = IslandsConfig(count=COUNT, index=index, address=address, compress="int8")
    save, data = f"{directory}/{index}/merged", TRAIN_ROWS[index::COUNT]
    return trainers_run(f"{directory}/{index}", islands=islands, save=save, data=data, **HOW[index], **how)[0]


def merged(directory, index: int) -> dict[str, torch.Tensor]:
    return load_file(directory / str(index) / "merged" / "model.safetensors")


def check_same(directory) -> None:
    first, second = (merged(directory, index) for index in range(COUNT))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_two_trainers_end_with_one_model(tmp_path):
    """A step of each is not finite, and it takes another instead: the first one beyond its two epochs of 7 steps.

    Later the second one comes back from a checkpoint.
    """
    directory = str(tmp_path)
    with serving(tmp_path / "rounds") as server, worlds(1, 2) as (first, second):
        results = at_once(
            lambda: first.run(train, directory, 0, server.address, spoiled_step=9),
            lambda: second.run(train, directory, 1, server.address, spoiled_step=5),
        )
        check_same(tmp_path)
        for told in (result[0] for result in results):
            assert told["t"] == STEPS and told["restarts"] == [4, 8, 12, STEPS]  # the last exchange merges
            assert told["exchanges"] == [(4, 1), (8, 2), (12, 3), (STEPS, 4)]
            assert len(told["losses"]) == STEPS + 1
        assert results[0][0]["losses"][0] != results[1][0]["losses"][0], "they train on other rows"

        (tmp_path / "1" / "merged" / "model.safetensors").unlink()
        shutil.rmtree(tmp_path / "1" / f"checkpoint-{STEPS}")
        back = second.run(train, directory, 1, server.address, resume=SAVED_AT)[0]
        assert back["t"] == STEPS and back["losses"] == [], "the exchanges were made without it"
        assert list(back["eval"])[-1] == STEPS and not back["is_in_train"]
        assert (tmp_path / "1" / f"checkpoint-{STEPS}" / "trainer_state.json").exists()
        check_same(tmp_path)


def following(t: int, exchange=None) -> tuple[StepsOfIsland, SimpleNamespace, TrainerState]:
    """An engine of 14 steps at step `t`, and the state of a Trainer that has counted one more."""
    exchange = exchange or SimpleNamespace(begin=lambda: None, take_reports=list)
    engine = SimpleNamespace(t=t, exchange=exchange, lr_scheduler=SimpleNamespace(last_step=STEPS))
    trainer = SimpleNamespace(model_wrapped=engine, _globalstep_last_logged=t + 1)
    state = TrainerState(global_step=t + 1, max_steps=STEPS)
    return StepsOfIsland(trainer), engine, state


ARGS = SimpleNamespace(
    logging_first_step=False, logging_strategy="steps", eval_strategy="steps", save_strategy="steps", eval_delay=0
)


def after_step(steps: StepsOfIsland, state: TrainerState, *, at_end: bool = False) -> TrainerControl:
    """Count a step as the Trainer does; returns what it does then. at_end: what it takes the step for."""
    state.global_step += 1
    control = TrainerControl(should_training_stop=at_end, should_save=at_end, should_evaluate=at_end)
    steps.after_step(ARGS, state, control)
    return control


def ends(control: TrainerControl) -> bool:
    assert control.should_save == control.should_evaluate == control.should_training_stop
    return control.should_training_stop


def test_steps_of_others_count():
    steps, engine, state = following(5)
    steps.begin(ARGS, state, TrainerControl())
    assert state.global_step == 5, "a step that was not finite was counted before"
    engine.t = 6
    assert not ends(after_step(steps, state)) and state.global_step == 6
    engine.t = 9  # a step, and an exchange that was made good
    assert not ends(after_step(steps, state)) and state.global_step == 9
    assert steps._trainer._globalstep_last_logged == 5 + 2
    engine.t = STEPS
    assert ends(after_step(steps, state)) and state.global_step == STEPS


def test_a_step_that_is_not_finite_does_not_count():
    steps, engine, state = following(STEPS - 1)
    steps.begin(ARGS, state, TrainerControl())
    assert not after_step(steps, state, at_end=True).should_training_stop and state.global_step == STEPS - 1
    assert steps._trainer._globalstep_last_logged == STEPS - 2, "its loss is in the sum"
    engine.t = STEPS
    assert ends(after_step(steps, state, at_end=True))


def test_one_that_comes_back_after_the_end_has_nothing_to_train(caplog):
    exchange = SimpleNamespace(take_reports=list)
    steps, engine, state = following(9, exchange)
    exchange.begin = lambda: setattr(engine, "t", STEPS)
    for has_moved in (True, False):
        control = TrainerControl()
        with pytest.raises(NothingLeftError):
            steps.begin(ARGS, state, control)
        assert ends(control) == has_moved
    assert state.global_step == STEPS
    steps.end()
    assert not caplog.records
    engine.t = 12  # somebody stopped it
    steps.end()
    assert "after step 12 of 14, without the last exchange" in caplog.text


def refused(directory: str, kind: str, changes: dict) -> str:
    """On a rank: what a Trainer says to being an island."""
    os.environ[VARIABLE] = SECRET
    changes = dict(changes)
    islands = IslandsConfig(**{"count": 2, "address": "127.0.0.1:5555", **changes.pop("islands", {})})

    def make() -> None:
        with made_trainer(directory, 1, kind=kind, islands=islands, frozen=changes):
            pass

    return said(make)


@pytest.mark.parametrize("kind", ["subclass", "callback"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"islands": {"index": 2}}, "islands.index: 2 is not below islands.count 2"),
        ({"islands": {"address": None}}, "islands: count and address must be set"),
        ({"trains": "B", "restart_init": "random", "residual_every": 2}, "ReLoRAConfig.residual_every: 2 changes W"),
    ],
)
def test_what_cannot_exchange_is_refused(tmp_path, kind, changes, message):
    [found] = ranks(1).run(refused, str(tmp_path), kind, changes)
    assert message in found

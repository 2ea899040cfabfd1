"""Steps that are not to be trusted: loss spikes, merges that would not be finite, and giving up."""

import math
import random
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from relora_ds.checkpoint import store
from relora_ds.config import GuardConfig
from relora_ds.data import TrainLoader
from relora_ds.training.batches import train_batches
from relora_ds.training.exit_codes import GuardError
from relora_ds.training.hooks import Hook
from relora_ds.training.hooks.guard import BadSteps
from relora_ds.training.preflight import check
from relora_ds.training.spikes import WINDOW, LossSpikes
from relora_ds.training.trainer import Trainer
from relora_ds.zero.merging import NonFiniteMergeError
from tests.parity import cases
from tests.ranks import ranks
from tests.training.runs import lines, losses, run, status
from tests.zero.test_nonfinite import everything

BATCH = 8
BAD_STEPS = (47,)  # on a fresh path through the data
SETTINGS = [
    "train.steps=60",
    "checkpoint.every=10",
    "checkpoint.keep_last=9",
    "eval.samples=0",
    "precision=fp32",
    "guard.spike_zscore=2",
]


# -- the judge -------------------------------------------------------------------------------------------------------


def falling(num: int, seed: int = 0) -> list[float]:
    """A loss that falls from 8 to 4, with noise."""
    chance = random.Random(seed)
    return [4 + 4 * math.exp(-step / 50) + chance.gauss(0, 0.05) for step in range(num)]


def test_no_false_alarm_on_a_loss_that_falls_and_then_lies_flat():
    for seed in range(5):
        spikes = LossSpikes(GuardConfig())
        assert not any(spikes.take(loss) for loss in falling(2000, seed))


def test_a_spike_is_found_and_says_what_it_is():
    spikes = LossSpikes(GuardConfig(), falling(500)[-WINDOW:])
    spike = spikes.take(5.5)
    assert spike.loss == 5.5 and 3.9 < spike.median < 4.1 and spike.zscore > 15
    assert len(spikes.losses) == WINDOW


def test_outliers_do_not_hide_the_next_one():
    spikes = LossSpikes(GuardConfig(), falling(500)[-WINDOW:])
    assert all(spikes.take(9.0) for _ in range(WINDOW // 3))


def test_a_new_level_is_accepted_in_the_end():
    spikes = LossSpikes(GuardConfig(), falling(500)[-WINDOW:])
    found = [spikes.take(6.0 + 0.01 * (i % 5)) is not None for i in range(2 * WINDOW)]
    assert found[0] and not any(found[WINDOW:])


def test_what_is_not_applied_does_not_enter_the_window():
    spikes = LossSpikes(GuardConfig(on_spike="skip"), falling(500)[-WINDOW:])
    before = list(spikes.losses)
    assert all(spikes.take(9.0) for _ in range(500))
    assert spikes.take(math.nan) is None
    assert list(spikes.losses) == before


def test_bad_steps_in_a_row_end_the_run():
    guard = BadSteps(GuardConfig(max_bad_steps=3))
    for applied in (False, False, True, False, False):
        guard.record(applied)
    with pytest.raises(GuardError, match="guard.max_bad_steps: 3 steps in a row"):
        guard.record(False)


# -- runs ------------------------------------------------------------------------------------------------------------


class Elsewhere(Hook):
    """Has the data go on from a place of its own."""

    def __init__(self, loader: dict):
        self._loader = loader

    def on_begin(self, run):
        run.loader = train_batches(run.plan, self._loader)


def train_with_bad_data(overrides: list[str], bad_steps=BAD_STEPS, loader: dict | None = None) -> dict:
    """On a rank: train where the last rank's data of some places are one token over and over.

    loader: where the data go on, instead of where the checkpoint was.
    """
    real = TrainLoader.next_step

    def spoiled(self):
        bad = self.order.taken // BATCH + 1 in bad_steps and dist.get_rank() == dist.get_world_size() - 1
        for batch in real(self):
            yield {name: torch.full_like(value, 511) for name, value in batch.items()} if bad else batch

    trainer = Trainer(check("tiny", overrides), [] if loader is None else [Elsewhere(loader)])
    TrainLoader.next_step = spoiled
    try:
        return trainer.fit() | {"loader": trainer.run.loader.state_dict()}
    finally:
        TrainLoader.next_step = real


def spoiled_run(run_dir, *overrides: str, **how) -> dict:
    return ranks(2).run(train_with_bad_data, [f"run_dir={run_dir}", *SETTINGS, *overrides], **how)[0]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(run directory, summary) of a run that applied its spike at step 47, with a checkpoint after step 45."""
    directory = tmp_path_factory.mktemp("runs") / "reported"
    return directory, spoiled_run(directory, "checkpoint.every=45")


def test_report(reported):
    directory, summary = reported
    assert (summary["loss_spikes"], summary["skipped_steps"], summary["rollbacks"]) == (1, 0, 0)
    (spike,) = lines(directory, "spike")
    assert spike["step"] == 47 and spike["loss"] == losses(directory)[47] and spike["zscore"] > 2


@pytest.mark.slow
def test_report_does_not_depend_on_how_often_it_is_logged(reported, tmp_path):
    spoiled_run(tmp_path / "seldom", "log.every=7")
    often, seldom = (lines(directory, "spike") for directory in (reported[0], tmp_path / "seldom"))
    assert [(s["step"], s["loss"], s["zscore"]) for s in often] == [(s["step"], s["loss"], s["zscore"]) for s in seldom]


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_skip(tmp_path, stage):
    """The bad batch leaves no trace: the run is that of a loader which never had it."""
    summary = spoiled_run(tmp_path / "r", "guard.on_spike=skip", f"deepspeed=zero{stage}")
    assert (summary["loss_spikes"], summary["skipped_steps"]) == (1, 1) and summary["step"] == 60
    (spike,) = lines(tmp_path / "r", "spike")
    assert spike["step"] == 46 and spike["zscore"] > 2  # after that step
    seen = losses(tmp_path / "r")
    assert list(seen) == list(range(1, 61)) and spike["loss"] not in seen.values()
    assert spike["loss"] > max(seen[step] for step in range(30, 61))  # at the first steps losses are as high


def test_rollback_is_a_resume_with_later_data(tmp_path):
    summary = spoiled_run(tmp_path / "r", "guard.on_spike=rollback")
    assert (summary["loss_spikes"], summary["skipped_steps"], summary["rollbacks"]) == (1, 1, 1)
    assert [line["step"] for line in lines(tmp_path / "r", "train")] == list(range(1, 61))
    (spike,) = lines(tmp_path / "r", "spike")
    assert (spike["step"], spike["rolled_back_from"]) == (40, 46) and spike["zscore"] > 2
    assert summary["tokens"] == 67 * BATCH * 64
    # The batch that was spoiled was number 47; steps 41 to 60 take numbers 48 to 67.
    assert summary["loader"] == {"epoch": 0, "position": 67 * BATCH}
    checkpoint = tmp_path / "r" / "checkpoints" / "step_00000040"
    by_hand = spoiled_run(
        tmp_path / "by_hand", f"resume={checkpoint}", bad_steps=(), loader={"epoch": 0, "position": 47 * BATCH}
    )
    assert losses(tmp_path / "by_hand") == {s: x for s, x in losses(tmp_path / "r").items() if s > 40}
    assert by_hand["val_loss"] == summary["val_loss"]


def test_the_window_goes_with_the_checkpoint(reported, tmp_path):
    """Resumed two steps before the spike, it is found all the same; without the window it could not be."""
    spoiled_run(tmp_path / "on", f"resume={reported[0]}/checkpoints/step_00000045")
    first, second = (lines(directory, "spike")[0] for directory in (reported[0], tmp_path / "on"))
    assert first["zscore"] == second["zscore"]


def give_up(overrides: list[str], bad_steps) -> str:
    try:
        train_with_bad_data(overrides, bad_steps)
    except GuardError as error:
        return str(error)
    return "it did not"


@pytest.mark.slow
def test_spike_after_spike_ends_the_run(tmp_path):
    said, _ = ranks(2).run(
        give_up, [f"run_dir={tmp_path / 'r'}", *SETTINGS, "guard.on_spike=skip", "guard.max_bad_steps=4"], range(47, 99)
    )
    assert said.startswith("guard.max_bad_steps: 4 steps in a row") and "step_00000040" in said


@pytest.mark.slow
def test_rolling_back_again_and_again_ends_the_run(tmp_path):
    said, _ = ranks(2).run(
        give_up, [f"run_dir={tmp_path / 'r'}", *SETTINGS, "guard.on_spike=rollback"], (47, 49, 51, 53, 55)
    )
    assert said.startswith("guard.on_spike: 3 times back to step 40")


@pytest.mark.slow
def test_nothing_to_roll_back_to_yet_skips(tmp_path):
    summary = spoiled_run(tmp_path / "r", "guard.on_spike=rollback", "checkpoint.every=50")
    assert (summary["skipped_steps"], summary["rollbacks"]) == (1, 0)


# -- a merge that would not be finite ----------------------------------------------------------------------------------


def poison(engine) -> None:
    """A and B of one layer, finite, with a product that is not."""
    name = next(iter(engine.frozen.layers))
    for factor in ("lora_A", "lora_B"):
        shape = engine.shards[f"{name}.{factor}"].shape
        engine.shards.write(f"{name}.{factor}", torch.full(shape, 1e30))


def poison_master(engine) -> None:
    """A weight that fp32 holds and fp16 does not."""
    for name in engine.frozen.owned()[:1]:
        engine.frozen.masters[name][0, 0] = 1e5


def refuse(spoil, frozen_dtype="auto", **how) -> tuple:
    engine = cases.build(
        relora=cases.relora_config(restart_every=99, restart_warmup_steps=2, frozen_dtype=frozen_dtype), **how
    )
    for step in range(3):
        cases.train_step(engine, step)
    spoil(engine)
    before, said = everything(engine), ""
    try:
        engine.restart()
    except NonFiniteMergeError as error:
        said = str(error)
    after = everything(engine)
    changed = [what for what in before if before[what] != after[what]]
    cases.release(engine)
    return said, changed


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_merge_that_is_not_finite_is_refused(stage, precision):
    for said, changed in ranks(2).run(refuse, poison, stage=stage, precision=precision):
        assert "in 1 of" in said and "nothing was changed" in said
        assert changed == []


def test_a_stored_copy_that_would_not_be_finite_is_refused():
    for said, changed in ranks(2).run(refuse, poison_master, stage=1, precision="fp32", frozen_dtype="fp16"):
        assert "in 2 of" in said and "nothing was changed" in said
        assert changed == []


class Poison(Hook):
    """Spoils the factors before the first restart."""

    @contextmanager
    def around_step(self, run):
        engine = run.engine
        restart = engine.restart_if_due
        engine.restart_if_due = lambda: (poison(engine) if engine.t == 10 else None, restart())
        try:
            yield
        finally:
            del engine.restart_if_due


def train_to_a_bad_merge(overrides: list[str]) -> str:
    try:
        Trainer(check("tiny", overrides), [Poison()]).fit()
    except GuardError as error:
        return str(error)
    return "it did not"


def test_the_run_stops_with_the_last_good_state_saved(tmp_path):
    settings = [f"run_dir={tmp_path / 'r'}", "eval.samples=0", "checkpoint.every=19", "train.steps=24"]
    for said in ranks(2).run(train_to_a_bad_merge, settings):
        assert "would not be finite" in said and said.endswith("step_00000019")
    run(tmp_path / "whole", *settings[1:])
    run(tmp_path / "r", *settings[1:], "resume=auto")
    assert store.verify(tmp_path / "r" / "checkpoints" / "step_00000019") == []
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")
    assert status(tmp_path / "r")["state"] == "done"

"""The Trainer's own order of the data, with dropout: no forward of ours draws from the generator that decides it."""

import itertools

import pytest

from tests.interop.trainers import MICRO, MICROS, SAVED_AT, STEPS, TRAIN_ROWS, trainers_run
from tests.ranks import ranks


# In a later epoch than the first, transformers 5.24 itself resumes "group_by_length" with the order of the first.
@pytest.mark.parametrize(
    "strategy, saved_at", [pytest.param("random", SAVED_AT, marks=pytest.mark.slow), ("group_by_length", 5)]
)
def test_every_row_comes_once_an_epoch_also_after_a_resume(tmp_path, strategy, saved_at):
    how = dict(stage=1, lora_dropout=0.2, train_sampling_strategy=strategy, save_steps=saved_at)
    again = saved_at == SAVED_AT  # in the same process, whose generators the first run has used
    found = ranks(2).run(trainers_run, str(tmp_path), again=again, **how)
    found = [
        [*runs, *resumed]
        for runs, resumed in zip(found, ranks(2).run(trainers_run, str(tmp_path), resume=saved_at, **how), strict=True)
    ]
    for one, *others in found:
        assert len(others) == 1 + again
        for other in others:
            assert one["rows"][saved_at:] == other["rows"] and len(other["rows"]) == STEPS - saved_at
            assert one["losses"][saved_at:] == other["losses"], "other dropout masks"
    whole = [runs[0] for runs in found]
    assert STEPS == 2 * MICROS
    epochs = []
    for steps in (slice(0, MICROS), slice(MICROS, STEPS)):
        seen = [row for rank in whole for row in itertools.chain.from_iterable(rank["rows"][steps])]
        assert len(seen) == 2 * MICRO * MICROS and sorted(seen) == sorted(TRAIN_ROWS.tolist())
        epochs.append(seen)
    assert epochs[0] != epochs[1], "the same order in every epoch"

"""transformers' Trainer resumes on another number of ranks and at another ZeRO stage."""

import pytest

from tests.interop.test_hf_trainer import SAVED_AT, STEPS, made_trainer
from tests.ranks import ranks

GLOBAL_BATCH = 6


def losses_of(directory: str, stage: int, micro: int, resume: bool) -> dict[int, float]:
    """On a rank: train, through restarts after 4, 8 and 12; return the mean loss of all ranks by step."""
    how = dict(per_device_train_batch_size=micro, dataloader_drop_last=True, eval_strategy="no")
    with made_trainer(directory, stage, model_seed=int(resume), **how) as trainer:
        trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-{SAVED_AT}" if resume else None)
        assert trainer.model_wrapped.restarts == [4, 8, 12]
        return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trainer")
    return directory, ranks(2).run(losses_of, str(directory), 1, GLOBAL_BATCH // 2, False)[0]


@pytest.mark.parametrize("world_size", [1, 3])
def test_saved_at_stage_1_on_2_ranks_it_resumes_at_stage_3(unmoved, world_size):
    directory, expected = unmoved
    assert list(expected) == list(range(1, STEPS + 1))
    found = ranks(world_size).run(losses_of, str(directory), 3, GLOBAL_BATCH // world_size, True)[0]
    for step in range(SAVED_AT + 1, STEPS + 1):
        assert found[step] == pytest.approx(expected[step], rel=1e-4), step

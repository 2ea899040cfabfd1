"""What a regular optimizer step of the trainer waits for and keeps, on emulated GPUs at stage 1."""

import pytest

from tests.emulated_cuda import runs
from tests.emulated_cuda.pool import emulated_ranks

VOCABULARY, MICRO_BATCH, LENGTH, REGULAR = 2048, 32, 64, 4
# DeepSpeed's optimizer: whether a gradient is not finite; the norm of each group's gradients, and of all.
WAITS = {
    "deepspeed/runtime/zero/stage_1_and_2.py:has_overflow": 1,
    "deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace": 3,
    "deepspeed/runtime/utils.py:is_invalid_grad_norm": 4,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of a run on two ranks, whose logits take much more memory than all else."""
    return emulated_ranks().run(
        runs.train,
        [
            f"run_dir={tmp_path_factory.mktemp('runs') / 'run'}",
            "deepspeed=zero1",
            "precision=bf16",
            "warm_start_steps=0",
            "train.steps=6",
            "optim.warmup_steps=1",
            f"train.batch_sequences={2 * MICRO_BATCH}",
            f"train.micro_batch_size={MICRO_BATCH}",
            "activation_checkpointing=full",
            "log.every=100",
            "eval.samples=0",
        ],
        vocabulary=VOCABULARY,
    )


def test_the_host_waits_for_nothing_but_deepspeeds_optimizer(results):
    for steps, _ in results:
        waits = steps[REGULAR].waits
        assert {place: number for place, number in waits.items() if number > WAITS.get(place, 0)} == {}


def test_logits_are_there_once(results):
    """bf16, fp32, and the fp32 gradient beside its bf16 copy: 12 bytes, and what else a step needs."""
    for steps, _ in results:
        assert steps[REGULAR].peak / (MICRO_BATCH * LENGTH * VOCABULARY) < 12.9


def test_nothing_is_left_of_a_run(results):
    for _, left in results:
        assert left <= 64

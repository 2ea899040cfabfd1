"""A run that goes on with other ranks, at other stages and in other formats is still the same run."""

import pytest

from tests.small_models import FAMILIES
from tests.training.runs import lines, losses, run

SETTINGS = ("train.steps=36", "checkpoint.every=6", "checkpoint.keep_last=99", "log.every=1")


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "unmoved"
    run(directory, *SETTINGS, "deepspeed=zero1", "precision=fp32")
    return directory


@pytest.mark.parametrize(
    "legs",
    [
        # (after step, ranks, stage): through the warm start, the transition at 10 and the restarts after 20 and 30
        pytest.param([(0, 2, 1), (6, 1, 1), (18, 2, 1)], marks=pytest.mark.slow),
        pytest.param([(0, 2, 1), (12, 2, 3), (18, 2, 0), (30, 2, 2)], marks=pytest.mark.slow),
        [(0, 1, 0), (6, 2, 3), (24, 1, 2)],
    ],
    ids=["ranks", "stages", "both"],
)
def test_moving_between_ranks_and_stages(unmoved, tmp_path, legs):
    directory, previous = tmp_path / "0", None
    for leg, (after, world_size, stage) in enumerate(legs):
        directory = tmp_path / str(leg)
        stop = legs[leg + 1][0] if leg + 1 < len(legs) else 36
        resume = () if previous is None else (f"resume={previous}/checkpoints/step_{after:08d}",)
        run(directory, *SETTINGS, f"deepspeed=zero{stage}", "precision=fp32", *resume, world_size=world_size)
        ours, whole = losses(directory), losses(unmoved)
        assert min(ours) == after + 1
        for step in range(after + 1, stop + 1):
            assert ours[step] == pytest.approx(whole[step], rel=1e-4), f"step {step}"
        previous = directory
    assert lines(directory, "eval")[-1]["val_loss"] == pytest.approx(lines(unmoved, "eval")[-1]["val_loss"], rel=1e-4)


def test_one_sided_chains_move_within_a_cycle_and_at_a_refresh(tmp_path):
    """Their bases and moments are whole tensors by name. A basis from another order of sums is near to the same."""
    settings = ("relora.trains=B", "relora.restart_init=gradient", "relora.optimizer_reset=rotate", "precision=fp32")
    settings = (*SETTINGS, *settings, "checkpoint.every=5")
    run(tmp_path / "whole", *settings, "deepspeed=zero1")
    whole = losses(tmp_path / "whole")
    for after, world_size, stage in [(15, 1, 3), (20, 2, 0)]:
        resume = f"resume={tmp_path / 'whole'}/checkpoints/step_{after:08d}"
        run(tmp_path / str(after), *settings, f"deepspeed=zero{stage}", resume, world_size=world_size)
        moved = losses(tmp_path / str(after))
        assert min(moved) == after + 1
        assert all(loss == pytest.approx(whole[step], rel=1e-4) for step, loss in moved.items())


@pytest.mark.parametrize(
    "changed",
    ["train.micro_batch_size=1", "relora.frozen_dtype=int8", pytest.param("precision=bf16", marks=pytest.mark.slow)],
)
def test_another_micro_batch_format_or_precision(unmoved, tmp_path, changed):
    run(
        tmp_path / "r",
        *SETTINGS,
        "deepspeed=zero1",
        "precision=fp32",
        changed,
        f"resume={unmoved}/checkpoints/step_00000024",
    )
    exact = changed.startswith("train.")
    for step, loss in losses(tmp_path / "r").items():
        assert loss == pytest.approx(losses(unmoved)[step], rel=1e-4 if exact else 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_layouts_of_weights_move_too(tmp_path, family):
    longest = {"gpt2": {"n_positions": 64}, "mixtral": {"max_position_embeddings": 64}}[family]
    FAMILIES[family](**longest, vocab_size=512).config.save_pretrained(tmp_path / "shape")
    experts = ["relora.target_parameters=[gate_up_proj,experts.down_proj]"] if family == "mixtral" else []
    settings = (*SETTINGS, "model.preset=null", f"model.name_or_path={tmp_path / 'shape'}", "precision=fp32", *experts)
    settings = (*settings, "train.steps=24")
    run(tmp_path / "whole", *settings, "deepspeed=zero1")
    resume = f"resume={tmp_path / 'whole'}/checkpoints/step_00000018"
    run(tmp_path / "moved", *settings, "deepspeed=zero3", resume, world_size=1)
    whole, moved = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert min(moved) == 19 and [line["step"] for line in lines(tmp_path / "moved", "restart")] == [20]
    assert all(loss == pytest.approx(whole[step], rel=1e-4) for step, loss in moved.items())

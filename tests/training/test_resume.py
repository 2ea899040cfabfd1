"""A resumed run is the run that would have been: in the warm start, at the phase transition, through restarts."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from relora_ds.checkpoint.find import ResumeError
from relora_ds.checkpoint.store import drop_after
from relora_ds.config import DataConfig, Recipe
from relora_ds.data import tokenizer
from relora_ds.training.compatibility import _own_tokenizer
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.ranks import ranks
from tests.training.runs import died_before_its_first_checkpoint, lines, losses, run


def _weights(directory):
    return load_file(directory / "export" / "model.safetensors")


def _compare(directory, whole, first_step):
    ours, theirs = losses(directory), losses(whole)
    assert min(ours) == first_step
    assert all(ours[step] == theirs[step] for step in ours), "a loss differs"
    assert len(lines(directory, "restart")) == sum(r["step"] >= first_step for r in lines(whole, "restart"))
    assert [r["checksum"] for r in lines(directory, "restart")] == [
        r["checksum"] for r in lines(whole, "restart") if r["step"] >= first_step
    ]
    first, second = _weights(directory), _weights(whole)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "settings",
    [
        ("deepspeed=zero1", "precision=bf16"),
        pytest.param(("deepspeed=zero1", "precision=fp32"), marks=pytest.mark.slow),
        pytest.param(("deepspeed=zero2", "precision=bf16"), marks=pytest.mark.slow),
        pytest.param(("deepspeed=zero3", "precision=bf16"), marks=pytest.mark.slow),
        pytest.param(("deepspeed=zero0", "precision=bf16"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_resume_is_exact(tmp_path, settings):
    whole = tmp_path / "whole"
    settings = (*settings, "train.steps=33")  # some steps beyond the second restart
    run(whole, "checkpoint.every=5", "checkpoint.keep_last=99", *settings)
    for step in (5, 10, 15, 20, 25):  # warm start, the transition, before and exactly at a restart, after it
        directory = tmp_path / f"from-{step}"
        run(directory, f"resume={whole}/checkpoints/step_{step:08d}", *settings)
        _compare(directory, whole, step + 1)


def test_auto_goes_on_in_place_and_drops_what_was_written_past_the_checkpoint(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, "checkpoint.every=8", "checkpoint.keep_last=9", "train.steps=24")
    # What a killed run leaves: metrics past its last checkpoint, no export.
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "export")
    shutil.rmtree(broken / "checkpoints" / "step_00000024")
    (broken / "checkpoints" / "latest").write_text("step_00000016")
    run(broken, "resume=auto", "train.steps=24")
    assert [line["step"] for line in lines(broken, "train")] == list(range(1, 25))
    assert [line["bytes_payload"] > 0 for line in lines(broken, "train")] == [True] * 24
    assert losses(broken) == losses(whole)
    assert [r["step"] for r in lines(broken, "restart")] == [20]


def test_auto_without_a_checkpoint_starts_at_the_beginning_and_forgets_the_attempt(tmp_path):
    run(tmp_path / "new", "resume=auto", "train.steps=15")
    died_before_its_first_checkpoint(tmp_path / "new")
    run(tmp_path / "new", "resume=auto", "train.steps=15")
    assert [line["step"] for line in lines(tmp_path / "new", "train")] == list(range(1, 16))


def test_going_back_to_an_older_checkpoint_drops_the_later_ones(tmp_path):
    run(tmp_path / "r", "checkpoint.every=5", "checkpoint.keep_last=9", "train.steps=20")
    run(
        tmp_path / "r",
        f"resume={tmp_path}/r/checkpoints/step_00000010",
        "checkpoint.every=9",
        "checkpoint.keep_last=2",
        "train.steps=20",
    )
    kept = sorted(p.name for p in (tmp_path / "r" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000018", "step_00000020"]


def test_a_run_that_was_killed_after_going_back_goes_on_from_there(tmp_path):
    run(tmp_path / "r", "checkpoint.every=5", "checkpoint.keep_last=9", "train.steps=20")
    drop_after(tmp_path / "r", 10)  # what the resumed run does first
    (tmp_path / "r" / "checkpoints" / "step_00000015").mkdir()  # killed while it deleted
    run(tmp_path / "r", "resume=auto", "checkpoint.every=9", "train.steps=20")
    assert [line["step"] for line in lines(tmp_path / "r", "phase")][-1] == 10


def test_old_checkpoints_are_deleted(tmp_path):
    run(tmp_path / "r", "checkpoint.every=5", "checkpoint.keep_last=2", "checkpoint.keep_every=10", "train.steps=31")
    kept = sorted(p.name for p in (tmp_path / "r" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000010", "step_00000020", "step_00000030", "step_00000031"]


def resume(overrides: list[str]) -> str:
    try:
        Trainer(check("tiny", overrides)).fit()
    except ResumeError as error:
        return str(error)
    return ""


def test_what_would_make_another_run_is_refused_by_name(tmp_path):
    settings = ["warm_start_steps=0", "train.steps=15", "eval.samples=0"]
    run(tmp_path / "r", *settings)
    overrides = [f"run_dir={tmp_path / 'new'}", f"resume={tmp_path / 'r' / 'checkpoints'}", *settings]
    for changed, words in [
        ("seed=1", "seed was 0, is 1"),
        ("train.steps=12", "train.steps is 12, and the "),
        ("data.max_tokens=50000", "the training data or the tokenizer are others"),
        ("warm_start_steps=4", "warm_start_steps was 0, is 4"),
        ("method=lora", "method was relora"),
        ("relora.r=8", "relora.r was 4, is 8, which can change directly after a restart only; resume from step 10"),
        ("model.preset=llama_9m", "does not fit: "),
    ]:
        [message] = ranks(1).run(resume, [*overrides, changed])
        assert words in message and "resume" in message, changed
    assert not (tmp_path / "new").exists()


def resume_where_tokenizers_are_trained_otherwise(overrides: list[str]) -> str:
    tokenizer.TRAINING["max_sentencepiece_length"] = 6
    try:
        return resume(overrides)
    finally:
        del tokenizer.TRAINING["max_sentencepiece_length"]


def test_a_run_keeps_its_tokenizer_where_another_one_would_be_trained(tmp_path):
    """As another version of sentencepiece does."""
    settings = ["warm_start_steps=0", "eval.samples=0", "train.steps=12", "checkpoint.every=8"]
    settings += ["checkpoint.keep_last=2"]
    run(tmp_path / "r", *settings)
    whole = losses(tmp_path / "r")
    overrides = [f"run_dir={tmp_path / 'r'}", f"resume={tmp_path / 'r/checkpoints/step_00000008'}", *settings]
    [message] = ranks(1).run(resume_where_tokenizers_are_trained_otherwise, overrides)
    own = re.search(r"the training data or the tokenizer are others .*(data\.tokenizer=\S+)\)", message)[1]
    assert ranks(1).run(resume_where_tokenizers_are_trained_otherwise, [*overrides, own]) == [""]
    resumed = losses(tmp_path / "r")
    assert resumed == whole and lines(tmp_path / "r", "phase")[-1]["step"] == 8


def test_only_a_tokenizer_that_would_be_trained_can_be_replaced_by_the_runs(tmp_path):
    (tmp_path / "checkpoints/tokenizer").mkdir(parents=True)

    def told(**settings: str) -> str:
        return _own_tokenizer(SimpleNamespace(recipe=Recipe(run_dir=str(tmp_path), data=DataConfig(**settings))))

    assert f"data.tokenizer={tmp_path}/checkpoints/tokenizer" in told(source="pydocs")
    assert told(source="pydocs", tokenizer="gpt2") == told(source="pretokenized", path="tokens") == ""


def resume_without_a_shared_disk(overrides: list[str], own: str) -> str:
    """Rank 1 looks for the run directory on a disk of its own."""
    return resume([*overrides, f"run_dir={own}/rank_{dist.get_rank()}"])


def test_machines_that_do_not_share_the_run_directory_are_told_so(tmp_path):
    run(tmp_path / "rank_0", "train.steps=12", "warm_start_steps=0", "checkpoint.every=6")
    overrides = ["resume=auto", "train.steps=12", "warm_start_steps=0"]
    for message in ranks(2).run(resume_without_a_shared_disk, overrides, str(tmp_path)):
        assert "['step_00000012', 'step_00000006'], []" in message and "share" in message
    assert not (tmp_path / "rank_1").exists()


def test_a_refused_checkpoint_leaves_the_run_as_it_was(tmp_path):
    """It is refused by the engine, late: its weights cannot be converted."""
    settings = (
        "checkpoint.every=5",
        "checkpoint.keep_last=9",
        "train.steps=15",
        "warm_start_steps=0",
        "eval.samples=0",
    )
    run(tmp_path / "r", *settings, "relora.frozen_dtype=int8", "relora.frozen_master=none")
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    overrides = [
        f"run_dir={tmp_path}/r",
        *settings,
        "relora.frozen_dtype=bf16",
        f"resume={tmp_path}/r/checkpoints/step_00000005",
    ]
    for message in ranks(2).run(resume, overrides):
        assert "relora.frozen_dtype was int8, is bf16" in message
    assert before == {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}


def test_a_finished_run_that_is_resumed_says_the_same_again(tmp_path):
    first = run(tmp_path / "r")
    before = lines(tmp_path / "r", "eval")
    assert run(tmp_path / "r", "resume=auto") == first
    assert lines(tmp_path / "r", "eval") == before and len(before) == 4

"""`relora_ds.load_run`: what a trainer, an own loop or an export left behind, as a plain model."""

import shutil
from pathlib import Path

import pytest
import torch

import relora_ds
from relora_ds import ReLoRAConfig
from relora_ds.zero.teardown import release
from tests.ranks import ranks
from tests.small_models import batch, llama

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0_1" / "run"
CHECKPOINT = FIXTURE / "checkpoints" / "step_00000017"
CONFIG = ReLoRAConfig(r=4, lora_alpha=8, restart_every=2, restart_warmup_steps=1)


@pytest.mark.parametrize("path", [FIXTURE, CHECKPOINT, FIXTURE / "checkpoints"])
def test_a_trainers_run_and_its_checkpoint(path):
    run = relora_ds.load_run(path)
    assert run.source == CHECKPOINT and run.step == 17
    model, tokenizer = run.merged(), run.tokenizer()
    assert model.dtype == torch.float32 and not any("lora" in name for name, _ in model.named_parameters())
    assert model(input_ids=tokenizer("The restart", return_tensors="pt").input_ids).logits.isfinite().all()
    if path != FIXTURE / "checkpoints":
        assert run.recipe.method == "relora" and run.status["state"] == "preempted" and run.summary == {}
        assert {line["kind"] for line in run.metrics} >= {"train", "restart"}


def test_a_checkpoint_by_name():
    assert relora_ds.load_run(FIXTURE, "step_00000017").source == CHECKPOINT
    with pytest.raises(ValueError, match=r"^checkpoint: step_00000018 is not in .*; there are step_00000017"):
        relora_ds.load_run(FIXTURE, "step_00000018")


def own_loop(directory: str, stage: int) -> dict[str, torch.Tensor]:
    engine, *_ = relora_ds.initialize(
        relora_ds.wrap(llama(), CONFIG), f"zero{stage}", lr=1e-2, total_steps=9, precision="fp32", micro_batch_size=4
    )
    for step in range(5):
        tokens = batch(step, 4)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    assert engine.restarts == [2, 4]
    engine.save_checkpoint(f"{directory}/saved")
    engine.save_merged(f"{directory}/merged")
    state = engine.collect_merged()
    release(engine)
    return state


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_own_loops_checkpoint_and_its_export(tmp_path, stage):
    expected = ranks(2).run(own_loop, str(tmp_path), stage)[0]
    [tag] = [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]
    for path in (tmp_path / "saved", tag, tmp_path / "merged"):
        run = relora_ds.load_run(path)
        model = run.merged()
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items()), path
        assert run.tokenizer() is None and run.recipe is None and run.metrics == [] and run.status == {}
        assert run.step == (None if path == tmp_path / "merged" else 5)
        assert run.merged(torch.bfloat16).dtype == torch.bfloat16


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="load_run: gpt2 is not a directory; give a run, a checkpoint"):
        relora_ds.load_run("gpt2")
    with pytest.raises(ValueError, match="load_run: .* is neither a run, a checkpoint, a Hugging Face model nor"):
        relora_ds.load_run(tmp_path)
    shutil.copy(FIXTURE / "recipe.yaml", tmp_path)
    with pytest.raises(ValueError, match="the run has no checkpoint"):
        relora_ds.load_run(tmp_path)


def test_damaged_weights_are_named(tmp_path):
    run = shutil.copytree(FIXTURE, tmp_path / "run")
    file = run / "checkpoints" / CHECKPOINT.name / "frozen_00000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="frozen_00000.safetensors"):
        relora_ds.load_run(run).merged()
    (run / "checkpoints" / "tokenizer" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="^tokenizer: .* cannot be loaded"):
        relora_ds.load_run(run).tokenizer()

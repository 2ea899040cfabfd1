"""Exports of runs and of their checkpoints: a model that Hugging Face loads, with the run's own loss."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import relora_ds
from relora_ds import data
from relora_ds.config import load_recipe
from relora_ds.interop import peft
from relora_ds.interop.hf_export import export, merged_state
from relora_ds.training.validation import evaluate
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import FAMILIES, VOCAB, batch
from tests.training.runs import lines, run

CPU = torch.device("cpu")
# Odd sizes, so that ZeRO-3 pads; biases in GPT-NeoX and Qwen2.
SHAPES = dict(
    hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
)


def loss_of(directory, run_dir):
    recipe = load_recipe(str(run_dir / "recipe.yaml"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    return evaluate(
        model, data.prepare(recipe.data), seq_len=recipe.data.seq_len, micro_batch_size=8, device=CPU
    ).val_loss


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A bf16 run with a checkpoint every 5 steps: warm start to 10, restarts at 20 and 30."""
    directory = tmp_path_factory.mktemp("runs") / "checkpoints"
    run(directory, "checkpoint.every=5", "checkpoint.keep_last=99", "precision=bf16", "train.steps=35")
    return directory


@pytest.fixture
def unfinished(checkpoints, tmp_path):
    """What a run that was killed after step 25 leaves."""
    directory = tmp_path / "unfinished"
    shutil.copytree(checkpoints, directory)
    shutil.rmtree(directory / "export")
    (directory / "summary.json").unlink()
    for step in (30, 35):
        shutil.rmtree(directory / "checkpoints" / f"step_{step:08d}")
    (directory / "checkpoints" / "latest").write_text("step_00000025")
    status = json.loads((directory / "status.json").read_text())
    (directory / "status.json").write_text(json.dumps({**status, "state": "running", "step": 25}))
    return directory


def test_the_last_checkpoint_is_the_finished_run(checkpoints, tmp_path):
    export(checkpoints, tmp_path / "end")
    tag = export(checkpoints, tmp_path / "tag", checkpoint="step_00000035")
    assert tag == checkpoints / "checkpoints" / "step_00000035"
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("tag", "end"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("tag", "end"))
    assert ours == theirs
    for name in ours:
        if name.endswith("json"):
            assert (tmp_path / "tag" / name).read_text() == (tmp_path / "end" / name).read_text(), name


def test_every_directory_has_the_files_that_other_programs_read(checkpoints, tmp_path):
    """llama.cpp's converter takes the tokenizer from tokenizer.model; transformers 4 knows no `rope_parameters`."""
    tag = checkpoints / "checkpoints" / "step_00000025"
    export(checkpoints, tmp_path / "end")
    export(checkpoints, tmp_path / "rounded", dtype="bf16")
    export(tag, tmp_path / "hf")
    export(tag, tmp_path / "peft", format="peft")
    trained = data.prepare(load_recipe(str(checkpoints / "recipe.yaml")).data).tokenizer_dir / "tokenizer.model"
    models = [checkpoints / "export", *(tmp_path / name for name in ("end", "rounded", "hf", "peft/base"))]
    for directory in (*models, checkpoints / "checkpoints" / "tokenizer", tmp_path / "peft"):
        assert (directory / "tokenizer.model").read_bytes() == trained.read_bytes(), directory
        config = json.loads((directory / "tokenizer_config.json").read_text())
        assert (config["add_bos_token"], config["add_eos_token"], config["legacy"]) == (False, False, False), directory
    for directory in models:
        assert json.loads((directory / "config.json").read_text())["rope_theta"] == 10_000, directory


@pytest.mark.parametrize(
    "stage, options",
    [
        pytest.param(1, ["frozen_dtype=int8"], marks=pytest.mark.slow),
        (3, ["frozen_dtype=nf4", "frozen_double_quant=true"]),
        pytest.param(
            3, ["frozen_dtype=int8", "frozen_placement=replicated", "frozen_master=none"], marks=pytest.mark.slow
        ),
    ],
)
def test_packed_weights_are_exported_as_the_weights_they_stand_for(tmp_path, stage, options):
    summary = run(
        tmp_path / "run", f"deepspeed=zero{stage}", "train.steps=25", *(f"relora.{option}" for option in options)
    )
    assert (summary["trainable_parameters"], summary["total_parameters"]) == (75_712, 176_064)
    newest = tmp_path / "run" / "checkpoints" / "step_00000025"
    export(newest, tmp_path / "hf")
    export(newest, tmp_path / "peft", format="peft")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", tmp_path / "run" / "export"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    merged = peft.load(tmp_path / "peft").merge_and_unload().state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step, phase", [(5, "warm_start"), (10, "warm_start"), (15, "relora"), (20, "relora")])
def test_every_phase_has_its_model(checkpoints, tmp_path, step, phase):
    export(checkpoints / "checkpoints" / f"step_{step:08d}", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.float32 and not any("lora" in name for name, _ in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tokenizer("An expression list", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"after {step} of the run's 35 steps (phase {phase})" in card and "warm_start_steps: 10" in card
    assert f"| tokens | {step * 8 * 64:,} |" in card and "trust_remote_code=True" not in card


def test_an_unfinished_run_gives_its_newest_checkpoint(unfinished, tmp_path):
    assert export(unfinished, tmp_path / "m").name == "step_00000025"
    card = (tmp_path / "m" / "README.md").read_text()
    [at_20] = [line for line in lines(unfinished, "eval") if line["step"] == 20]
    assert f"| validation loss (nats per token) | {at_20['val_loss']:.4f} |" in card
    assert "| evaluated after step | 20 |" in card
    # bf16 forward in the run, fp32 here
    assert loss_of(tmp_path / "m", unfinished) < at_20["val_loss"] + 0.1


def test_a_run_that_is_being_repeated_is_unfinished(checkpoints, tmp_path):
    """Its export/ is of the attempt before."""
    directory = tmp_path / "again"
    shutil.copytree(checkpoints, directory)
    for step in range(15, 36, 5):
        shutil.rmtree(directory / "checkpoints" / f"step_{step:08d}")
    (directory / "checkpoints" / "latest").write_text("step_00000010")
    (directory / "status.json").write_text(json.dumps({"state": "running"}))
    assert export(directory, tmp_path / "m").name == "step_00000010"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("checkpoint", [None, "step_00000025"])
def test_dtype(checkpoints, tmp_path, dtype, checkpoint):
    exact, rounded = tmp_path / "exact", tmp_path / "rounded"
    export(checkpoints, exact, checkpoint=checkpoint)
    export(checkpoints, rounded, checkpoint=checkpoint, dtype=dtype)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert json.loads((rounded / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    exact, rounded = load_file(exact / "model.safetensors"), load_file(rounded / "model.safetensors")
    assert all(torch.equal(value.to(wanted), rounded[name]) for name, value in exact.items())


EXPERTS = ["relora.target_parameters=[gate_up_proj,experts.down_proj]", "relora.trainable_modules=[gate,norms,head]"]


@pytest.mark.parametrize(
    "family",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt_neox", "qwen2", "gpt2")), "mixtral"],
)
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_export_has_the_runs_loss(tmp_path, family, tied):
    shapes = {"gpt2": {"n_positions": 64}, "mixtral": {"max_position_embeddings": 64}}.get(family, SHAPES)
    FAMILIES[family](**shapes, vocab_size=512, tie_word_embeddings=tied).config.save_pretrained(tmp_path / "shape")
    stage = {"llama": 1, "gpt_neox": 2, "qwen2": 3, "gpt2": 3, "mixtral": 2 + tied}[family]
    summary = run(
        tmp_path / "run",
        "model.preset=null",
        f"model.name_or_path={tmp_path / 'shape'}",
        "train.steps=27",
        "checkpoint.every=9",
        f"deepspeed=zero{stage}",
        "relora.restart_every=8",
        *(EXPERTS if family == "mixtral" else []),
    )
    assert summary["restarts"] == 2
    export(tmp_path / "run", tmp_path / "end")
    assert loss_of(tmp_path / "end", tmp_path / "run") == pytest.approx(summary["val_loss"], rel=1e-6)
    # and of a checkpoint: 18 is evaluated, because a cycle ends there
    export(tmp_path / "run", tmp_path / "at18", checkpoint="step_00000018")
    [at_18] = [line for line in lines(tmp_path / "run", "eval") if line["step"] == 18]
    assert loss_of(tmp_path / "at18", tmp_path / "run") == pytest.approx(at_18["val_loss"], rel=1e-6)
    names = set(load_file(tmp_path / "end" / "model.safetensors"))
    assert ("lm_head.weight" in names or "embed_out.weight" in names) != tied
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "end").config.tie_word_embeddings == tied


def own_loop(directory: str, family: str, tied: bool, stage: int) -> dict:
    """Without our trainer: wrap, train past a restart, save_merged and save_checkpoint."""
    config = cases.family_config(family, restart_every=4, restart_warmup_steps=2)
    model = relora_ds.wrap(FAMILIES[family](tie_word_embeddings=tied), config)
    engine, *_ = relora_ds.initialize(
        model, f"zero{stage}", config, lr=1e-2, total_steps=20, precision="fp32", micro_batch_size=12
    )
    for step in range(6):
        cases.train_step(engine, step)
    logits = cases.logits(engine)
    engine.save_merged(f"{directory}/merged")
    engine.save_checkpoint(directory, tag="mine")
    single = None
    if stage == 1:  # the single-process twin
        single = relora_ds.merge_and_unwrap(engine.module).state_dict()
    cases.release(engine)
    return {"logits": logits, "single": single}


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    "family, tied, stage",
    [
        ("llama", True, 0),
        ("gpt_neox", False, 1),
        ("gpt_neox", True, 3),
        ("qwen2", True, 1),
        ("qwen2", False, 2),
        ("gpt2", True, 1),
        ("gpt2", False, 3),
        ("mixtral", False, 1),
        ("mixtral", False, 3),
    ],
)
def test_without_our_trainer(tmp_path, family, tied, stage):
    result = ranks(2).run(own_loop, str(tmp_path), family, tied, stage)[0]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=batch(999, 4)).logits, result["logits"], rtol=1e-5, atol=1e-6)
    weights = dict(plain.named_parameters())
    state = merged_state(tmp_path / "mine")
    assert set(state) == set(weights) and all(torch.equal(state[name], weights[name]) for name in state)
    export(tmp_path, tmp_path / "exported")  # `latest` names the tag
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(
        torch.equal(exported[name], value)
        for name, value in load_file(tmp_path / "merged" / "model.safetensors").items()
    )
    if result["single"] is not None:
        for name, value in weights.items():
            torch.testing.assert_close(result["single"][name], value.detach(), rtol=1e-6, atol=1e-7)
    assert plain.config.vocab_size == VOCAB and plain.config.use_cache


def test_a_hub_models_generation_config_survives(tmp_path):
    model = FAMILIES["llama"](**SHAPES, vocab_size=512)
    model.generation_config.update(temperature=0.7, do_sample=True, top_k=11, _from_model_config=False)
    model.save_pretrained(tmp_path / "pretrained")
    run(
        tmp_path / "run",
        "model.preset=null",
        f"model.name_or_path={tmp_path / 'pretrained'}",
        "model.init=pretrained",
        "train.steps=14",
        "checkpoint.every=12",
        "warm_start_steps=0",
    )
    export(tmp_path / "run", tmp_path / "m", checkpoint="step_00000012")
    for directory in (tmp_path / "run" / "export", tmp_path / "m"):
        assert json.loads((directory / "generation_config.json").read_text())["top_k"] == 11


def test_nothing_to_export(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="neither a run of relora_ds nor a checkpoint"):
        export(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "young").mkdir()
    shutil.copy(checkpoints / "recipe.yaml", tmp_path / "young")
    with pytest.raises(ValueError, match=r"the run has no checkpoint .* resume=auto"):
        export(tmp_path / "young", tmp_path / "out")
    with pytest.raises(ValueError, match=r"step_7 is not in .* there are step_00000005, step_00000010"):
        export(checkpoints, tmp_path / "out", checkpoint="step_7")
    with pytest.raises(ValueError, match="which is a checkpoint itself"):
        export(checkpoints / "checkpoints" / "step_00000005", tmp_path / "out", checkpoint="step_00000010")
    with pytest.raises(ValueError, match="--dtype: fp8 is unknown; use fp32, bf16, fp16"):
        export(checkpoints, tmp_path / "out", dtype="fp8")
    with pytest.raises(ValueError, match="--format: gguf is unknown"):
        export(checkpoints, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(checkpoints, tmp_path / "full")


def test_a_lost_shard_is_named(unfinished, tmp_path):
    (unfinished / "checkpoints" / "step_00000025" / "trained_00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"trained_00001.safetensors is missing \(host "):
        export(unfinished, tmp_path / "out")
    assert not (tmp_path / "out").exists()

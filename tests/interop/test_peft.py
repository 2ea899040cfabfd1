"""PEFT exports: an adapter and its base give the run's function, and an adapter on another base is refused."""

import json
import re
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import relora_ds
from relora_ds import ReLoRAConfig
from relora_ds.interop import peft
from relora_ds.interop.hf_export import export
from relora_ds.interop.sources import weights_of
from relora_ds.models.whole_weights import WholeWeights
from tests.checkpoint.weights import weights_in
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import FAMILIES, batch
from tests.training.runs import run


def train(directory: str, family: str, stage: int, config: ReLoRAConfig, base: bool = True) -> dict:
    """Save before the restart at 4, directly after it, and in the cycle that follows; returns the logits there."""
    engine, *_ = relora_ds.initialize(
        relora_ds.wrap(FAMILIES[family](), config, base=base),
        f"zero{stage}",
        config,
        lr=1e-2,
        total_steps=20,
        precision="fp32",
        micro_batch_size=12,
    )
    logits = {}
    for step in range(7):
        if step in (3, 4, 6):
            engine.save_checkpoint(directory, tag=f"step{step}")
            logits[step] = cases.logits(engine)
        cases.train_step(engine, step)
    cases.release(engine)
    return logits


def config(family: str = "llama", **changes) -> ReLoRAConfig:
    return cases.family_config(family, restart_every=4, restart_warmup_steps=2, **changes)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=batch(999, 4)).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(directory of the tags step3, step4 and step6, logits by step)"""
    directory = tmp_path_factory.mktemp("runs")
    return directory, ranks(2).run(train, str(directory), "llama", 1, config())[0]


@pytest.mark.parametrize(
    "family, stage, changes, base",
    [
        pytest.param("llama", 2, {}, True, marks=pytest.mark.slow),
        pytest.param("gpt_neox", 1, {}, True, marks=pytest.mark.slow),
        pytest.param("qwen2", 3, {}, True, marks=pytest.mark.slow),
        ("llama", 1, {"target_modules": ["q_proj", "layers.1.mlp.up_proj"], "lora_alpha": 5.5, "r": 3}, True),
        ("llama", 0, {}, False),
        ("gpt2", 1, {"use_rslora": True}, True),
        ("mixtral", 3, {}, True),
    ],
    ids=["llama", "gpt_neox", "qwen2", "some-layers", "no-base", "gpt2", "mixtral"],
)
def test_adapter_and_base_are_the_runs_function(tmp_path, family, stage, changes, base):
    how = config(family, **changes) if base else cases.relora_config(restart_every=None)
    expected = ranks(2).run(train, str(tmp_path), family, stage, how, base)[0]
    for step, logits in expected.items():
        directory = tmp_path / f"peft{step}"
        export(tmp_path / f"step{step}", directory, format="peft")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory / "base"), directory)
        factors = [value for name, value in model.named_parameters() if "lora_B" in name]
        assert factors and all(value.any() for value in factors) == (step != 4 or not base)
        torch.testing.assert_close(logits_of(model), logits, rtol=1e-5, atol=1e-6)
        weights = weights_of(str(directory))
        assert isinstance(weights, WholeWeights if family == "mixtral" else peft.MergedWeights)
        plain = model.merge_and_unload()
        torch.testing.assert_close(logits_of(plain), logits, rtol=1e-5, atol=1e-6)
        for name, value in plain.named_parameters():
            torch.testing.assert_close(weights.read(name), value.detach(), rtol=1e-5, atol=1e-7)


def test_the_config_is_an_ordinary_one(trained, tmp_path):
    export(trained[0] / "step6", tmp_path / "a", format="peft")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["peft_type"]) == (4, 8, "LORA")
    assert sorted(written["target_modules"]) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert written["revision"] == peft.weights_sha256(tmp_path / "a" / "base")
    # ... and loads in one call, which passes the hash on as the base's revision
    torch.testing.assert_close(
        logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")), trained[1][6], rtol=1e-5, atol=1e-6
    )
    # PEFT keeps the hash when it saves
    peft.load(tmp_path / "a").save_pretrained(tmp_path / "again")
    peft.verify(tmp_path / "again", base=tmp_path / "a" / "base")
    assert "sha256" in (tmp_path / "a" / "README.md").read_text()


def test_an_adapter_on_another_base_is_refused_by_both_hashes(trained, tmp_path):
    for step in (3, 6):
        export(trained[0] / f"step{step}", tmp_path / f"{step}", format="peft")
    first, second = (peft.weights_sha256(tmp_path / f"{step}" / "base") for step in (3, 6))
    assert first != second and re.fullmatch("sha256:[0-9a-f]{64}", first)
    for attempt in (
        lambda: peft.load(tmp_path / "6", base=tmp_path / "3" / "base"),
        lambda: export(trained[0] / "step6", tmp_path / "3", format="peft"),
    ):
        with pytest.raises(ValueError, match="the base has moved on") as error:
            attempt()
        assert first in str(error.value) and second in str(error.value)
    # nothing was touched by the refused export
    assert {p.name for p in (tmp_path / "3").iterdir()} == {p.name for p in (tmp_path / "6").iterdir()}
    torch.testing.assert_close(logits_of(peft.load(tmp_path / "3")), trained[1][3], rtol=1e-5, atol=1e-6)
    shutil.rmtree(tmp_path / "6" / "base")
    shutil.copytree(tmp_path / "3" / "base", tmp_path / "6" / "base")
    with pytest.raises(ValueError, match="the base has moved on"):
        peft.load(tmp_path / "6")


def test_the_hash_is_of_the_weights_and_not_of_the_files(trained, tmp_path):
    export(trained[0] / "step6", tmp_path / "a", format="peft")
    base = tmp_path / "a" / "base"
    before = peft.weights_sha256(base)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert peft.weights_sha256(tmp_path / "shards") == before
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nextafter(weights["model.norm.weight"][0], torch.tensor(9.0))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert peft.weights_sha256(base) != before


def test_within_a_cycle_of_a_frozen_base_only_the_adapter_is_replaced(tmp_path):
    """With nothing trained beside A and B, W is all there is to the base, and two steps share it."""
    expected = ranks(2).run(
        train, str(tmp_path), "llama", 1, cases.relora_config(restart_every=None, trainable_modules=[])
    )[0]
    export(tmp_path / "step3", tmp_path / "a", format="peft")
    written = (tmp_path / "a" / "base" / "model.safetensors").stat().st_mtime_ns
    export(tmp_path / "step6", tmp_path / "a", format="peft")
    assert (tmp_path / "a" / "base" / "model.safetensors").stat().st_mtime_ns == written
    torch.testing.assert_close(logits_of(peft.load(tmp_path / "a")), expected[6], rtol=1e-5, atol=1e-6)


def test_dtype(trained, tmp_path):
    export(trained[0] / "step6", tmp_path / "a", format="peft", dtype="bf16")
    assert {v.dtype for v in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "base").dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(peft.load(tmp_path / "a")), trained[1][6], rtol=0.05, atol=0.02)


def test_what_has_no_adapter(tmp_path):
    run(tmp_path / "r", "checkpoint.every=10", "train.steps=16")
    with pytest.raises(
        ValueError, match=r"the checkpoint has no adapter: .* its phase is the warm start; use --format hf"
    ):
        export(tmp_path / "r", tmp_path / "out", format="peft", checkpoint="step_00000010")
    assert not (tmp_path / "out").exists()
    # the finished run has one: its last cycle
    export(tmp_path / "r", tmp_path / "out", format="peft")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 512
    export(tmp_path / "r", tmp_path / "hf")
    merged, plain = (
        logits_of(peft.load(tmp_path / "out")),
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")),
    )
    torch.testing.assert_close(merged, plain, rtol=1e-5, atol=1e-6)
    (tmp_path / "hf" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(ValueError, match="no adapter that relora_ds exported"):
        peft.load(tmp_path / "hf")


def test_its_weights_are_merged_one_at_a_time(trained, tmp_path):
    export(trained[0] / "step6", tmp_path / "a", format="peft")
    weights = weights_of(str(tmp_path / "a"))
    assert isinstance(weights, peft.MergedWeights) and weights.owners is None
    merged = dict(peft.load(tmp_path / "a").merge_and_unload().named_parameters())
    assert merged.keys() == weights.shapes.keys()
    for name, value in merged.items():
        torch.testing.assert_close(weights.read(name), value.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"alpha_pattern": {"layers.1.mlp.up_proj": 3}}])
def test_an_adapter_that_is_more_than_ours_is_merged_by_peft_on_rank_0(trained, tmp_path, change):
    export(trained[0] / "step6", tmp_path / "a", format="peft")
    about = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**about, **change}))
    weights = weights_of(str(tmp_path / "a"))
    assert isinstance(weights, WholeWeights) and set(weights.owners.values()) == {0}
    for name, value in peft.load(tmp_path / "a").merge_and_unload().named_parameters():
        assert torch.equal(weights.read(name), value), name


def test_the_checkpoint_of_an_own_loop_is_read_one_tensor_at_a_time(trained):
    weights = weights_of(str(trained[0] / "step6"))
    assert weights.owners is None  # no rank has to read all of it
    expected = weights_in(trained[0] / "step6")
    assert {name: value.shape for name, value in expected.items()} == weights.shapes
    assert all(torch.equal(weights.read(name), value) for name, value in expected.items())


@pytest.mark.parametrize("format", ["hf", "peft"])
def test_one_step_of_fine_tuning(trained, tmp_path, format):
    """Of the merged export with a new adapter, and of the exported adapter itself."""
    export(trained[0] / "step6", tmp_path / "m", format=format)
    if format == "hf":
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
            LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        )
    else:
        model = peft.load(tmp_path / "m", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=batch(7, 8), labels=batch(7, 8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]

"""One process reads what the ranks saved: the same weights, to the bit, as the engine collects from its masters."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import relora_ds
from relora_ds.checkpoint.model import CheckpointWeights, contents_of
from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.zero.plain_model import persistent_buffers
from tests.checkpoint.weights import weights_in
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import FAMILIES

# Between restarts, directly after one, after it again. Without a restart of its own, step 0 is the phase transition.
RELORA = cases.relora_config(restart_every=4, restart_warmup_steps=2)
SAVED_AT = (0, 2, 4, 6)


def save(
    stage, precision, directory: str, relora=RELORA, offload=False, family="llama", settings=None, base=True
) -> dict:
    """Train, and save at every step of SAVED_AT; returns what the engine collects there, `{step: {name: tensor}}`."""
    model = FAMILIES[family]()
    if relora is not None:
        relora_ds.wrap(model, relora, base=base)
    engine, *_ = relora_ds.initialize(
        model=model,
        config={**cases.ds_settings(stage, precision, offload), **(settings or {})},
        relora=relora,
        lr=cases.LR,
        total_steps=cases.STEPS,
        precision=precision,
        micro_batch_size=12,
    )
    collected = {}
    for step in range(max(SAVED_AT) + 1):
        if step in SAVED_AT:
            engine.save_checkpoint(directory, tag=str(step))
            collected[step] = engine.collect_merged(dst=0)
        cases.train_step(engine, step)
    layers = list(lowrank_layers(engine.module))
    kind = type(engine.optimizer).__name__
    cases.release(engine)
    return {"collected": collected, "layers": layers, "kind": kind}


def check(directory: Path, world_size=2, **how) -> dict:
    result = ranks(world_size).run(save, directory=str(directory), **how)[0]
    for step, expected in result["collected"].items():
        merged, about = weights_in(directory / str(step)), contents_of(directory / str(step))
        assert about.t == about.step == step and set(merged) == set(expected)
        for name, value in expected.items():
            assert merged[name].dtype == torch.float32 and torch.equal(merged[name], value), f"step {step}: {name}"
        base = weights_in(directory / str(step), updates=False)
        updated = {name for name in merged if not torch.equal(merged[name], base[name])}
        if how.get("relora", RELORA) is not None and how.get("base", True):
            assert about.restarts == [t for t in (4,) if t <= step]
            # B is 0 at the start and after a restart
            assert updated == (set() if step in (0, 4) else {f"{name}.weight" for name in result["layers"]})
    return result


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    "stage, precision",
    [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")],
)
def test_every_stage(tmp_path, stage, precision):
    check(tmp_path, stage=stage, precision=precision)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_full_rank_model(tmp_path, stage):
    check(tmp_path, stage=stage, precision="bf16", relora=None)


@pytest.mark.parametrize("stage", [1, 3])
def test_with_the_optimizer_on_cpu(tmp_path, stage):
    check(tmp_path, stage=stage, precision="bf16", offload=True)


def test_gradients_accumulated_in_fp32(tmp_path):
    result = check(tmp_path, stage=1, precision="bf16", settings={"data_types": {"grad_accum_dtype": "fp32"}})
    assert result["kind"] == "BF16_Optimizer"


def test_groups_that_zero_3_cuts_into_pieces(tmp_path):
    """As it does with large models."""
    check(tmp_path, stage=3, precision="bf16", settings={"zero_optimization": {"stage": 3, "sub_group_size": 500}})


@pytest.mark.parametrize("family, stage", [pytest.param("gpt_neox", 1, marks=pytest.mark.slow), ("qwen2", 3)])
def test_biases_and_tied_embeddings(tmp_path, family, stage):
    check(tmp_path, stage=stage, precision="bf16", family=family)


def test_another_world_size(tmp_path):
    check(tmp_path, world_size=1, stage=1, precision="bf16")


@pytest.mark.parametrize("stage", [0, 3])
def test_without_frozen_masters_the_stored_copy_counts(tmp_path, stage):
    relora = cases.relora_config(restart_every=4, restart_warmup_steps=2, frozen_master="none")
    check(tmp_path, stage=stage, precision="bf16", relora=relora)


def test_without_a_base_and_with_frozen_embeddings(tmp_path):
    config = ReLoRAConfig(r=4, lora_alpha=8, trainable_modules=["norms"])
    check(tmp_path, stage=2, precision="bf16", relora=config, base=False)


@pytest.mark.parametrize("lost", ["trained_00001.safetensors", "frozen_00000.safetensors", "manifest.json"])
def test_a_lost_file_is_named(tmp_path, lost):
    ranks(2).run(save, 1, "bf16", str(tmp_path))
    (tmp_path / "2" / lost).unlink()
    with pytest.raises(ValueError, match=f"{lost} is missing"):
        weights_in(tmp_path / "2")


def router_biases(directory: str, stage: int) -> None:
    """Save a mixture of experts, whose router has a bias that is a buffer, in every way there is."""
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_shared_experts=1,
    )
    model = DeepseekV3ForCausalLM(config)
    for name, buffer in persistent_buffers(model).items():
        assert name.endswith("e_score_correction_bias")
        buffer.copy_(torch.tensor([2.0, -2.0, 1.0, -1.0]))
    relora = dataclasses.replace(RELORA, target_modules=["o_proj"])
    relora_ds.wrap(model, relora)
    engine, *_ = relora_ds.initialize(
        model=model,
        config=cases.ds_settings(stage, "fp32"),
        relora=relora,
        lr=1e-3,
        total_steps=20,
        precision="fp32",
        micro_batch_size=12,
    )
    engine.save_merged(f"{directory}/merged")
    engine.save_checkpoint(f"{directory}/checkpoints", tag="t")
    cases.release(engine)


@pytest.mark.parametrize("stage", [1, 3])
def test_buffers_that_belong_to_the_model_are_kept(tmp_path, stage):
    ranks(2).run(router_biases, str(tmp_path), stage)
    [(name, bias)] = [(n, b) for n, b in load_file(tmp_path / "merged" / "model.safetensors").items() if "bias" in n]
    assert bias.tolist() == [2.0, -2.0, 1.0, -1.0]
    assert torch.equal(weights_in(tmp_path / "checkpoints" / "t")[name], bias)
    weights = CheckpointWeights(tmp_path / "checkpoints" / "t")
    assert weights.shapes[name] == bias.shape and torch.equal(weights.read(name), bias)

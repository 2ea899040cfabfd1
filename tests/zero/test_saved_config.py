"""What transformers 4 reads in the config.json of a saved model. It knows no `rope_parameters`."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    Olmo3Config,
    Qwen3MoeConfig,
)

from relora_ds.zero.saved_config import save_model, with_old_names

SIZES = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def layers(full: dict, sliding: dict) -> dict:
    return {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 8,
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
    }


CASES = {
    "theta": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None},
    ),
    "yarn": (LlamaConfig, {"rope_parameters": {**YARN, "rope_theta": 3e5}}, {"rope_theta": 3e5, "rope_scaling": YARN}),
    "llama3": (
        LlamaConfig,
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    "gpt_neox": (
        GPTNeoXConfig,
        {"rope_parameters": {**LINEAR, "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5, "rope_scaling": LINEAR},
    ),
    "gemma3": (
        Gemma3TextConfig,
        layers({**LINEAR, "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 2e4}),
        {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
    ),
    "olmo3": (
        Olmo3Config,
        layers({**YARN, "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        {"rope_theta": 5e5, "rope_scaling": YARN},
    ),
    # transformers 4 scales this family's frequencies where nothing is said
    "gpt_oss": (
        GptOssConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, **EXPERTS},
        {"rope_theta": 5e5, "rope_scaling": None},
    ),
    "qwen3_moe": (Qwen3MoeConfig, {**EXPERTS, "moe_intermediate_size": 16}, {"num_experts": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_names_of_transformers_4_stand_beside_the_new_ones(tmp_path, case):
    kind, settings, expected = CASES[case]
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **settings}), attn_implementation="eager").eval()
    save_model(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved.get(name, "absent") for name in expected} == expected
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = torch.arange(48).view(2, 24) % 67
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.config.to_dict()["rope_parameters"] == model.config.to_dict()["rope_parameters"]


def test_names_that_would_change_what_transformers_5_reads_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "relora_ds.zero.saved_config.with_old_names",
        lambda config: {**config, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    )
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    save_model(model, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters


def test_a_configuration_without_rotary_positions_stays_as_it_is():
    for config in ({"model_type": "gpt2", "n_embd": 8}, {"model_type": "jamba", "rope_parameters": None}):
        assert with_old_names(config) == config


def test_configurations_inside_a_configuration_are_read_too():
    inner = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert with_old_names({"model_type": "pair", "text_config": inner})["text_config"]["rope_theta"] == 5e5


def test_infinity_is_a_number():
    config = {"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert json.loads(json.dumps(with_old_names(config)))["time_step_limit"] == [0.0, float("inf")]

"""Scaled-down configurations: small, of the same structure, and models of them run."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from relora_ds.models.build import count_parameters, meta_model
from relora_ds.models.tiny import MAX_POSITIONS, VOCAB_SIZE, tiny_config

# Each with the kinds of its layers.
FAMILIES = {
    "llama": {"LlamaDecoderLayer"},
    "gpt2": {"GPT2Block"},
    "falcon": {"FalconDecoderLayer"},
    "mamba": {"MambaBlock"},
    "mixtral": {"MixtralExperts"},
    "qwen2": {"Qwen2DecoderLayer"},
    "gemma3_text": {"Gemma3Attention"},
    "deepseek_v3": {"DeepseekV3MLP", "DeepseekV3MoE"},  # latent attention; dense layers, then experts
    "jamba": {"JambaAttention", "JambaMambaMixer", "JambaExperts", "JambaMLP"},  # periods of 8 and 2
    "zamba2": {"Zamba2HybridLayer", "Zamba2MambaMixer"},  # listed layer indices, shared attention
    "qwen3_5": {"Qwen3_5Attention", "Qwen3_5GatedDeltaNet"},  # nested configurations
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_copy_runs_and_keeps_every_kind_of_module(family):
    config = CONFIG_MAPPING[family]()
    before = config.to_dict()
    small = tiny_config(config)
    assert type(small) is type(config) and config.to_dict() == before
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) < 700_000
    assert model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE
    assert FAMILIES[family] <= {type(module).__name__ for module in model.modules()}
    wanted = {type(module) for module in meta_model(config).modules()}
    assert {type(module) for module in model.modules()} == wanted
    ids = torch.arange(32).reshape(2, 16)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert 4 < loss.item() < 7  # about log(VOCAB_SIZE)


def test_what_makes_layers_different_stays():
    small = tiny_config(CONFIG_MAPPING["gemma3_text"]())
    assert small.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    small = tiny_config(CONFIG_MAPPING["lfm2"](full_attn_idxs=[2, 5, 8]))
    assert small.layer_types == ["conv", "conv", "full_attention"]
    small = tiny_config(CONFIG_MAPPING["zamba2"]())
    assert len(small.hybrid_layer_ids) == 2  # the second uses the weights of the first
    small = tiny_config(CONFIG_MAPPING["gemma3n_text"]())
    first_shared = small.num_hidden_layers - small.num_kv_shared_layers
    assert set(small.layer_types[:first_shared]) == set(small.layer_types[first_shared:])
    small = tiny_config(CONFIG_MAPPING["smollm3"]())
    assert small.no_rope_layers == [1, 1, 1, 0]  # a list that no module's structure shows
    small = tiny_config(CONFIG_MAPPING["gpt_neox_japanese"]())
    assert small.num_hidden_layers == 2  # the last layer is of a kind of its own


def test_what_a_user_has_set_stays():
    config = LlamaConfig(
        num_attention_heads=32,
        num_key_value_heads=8,
        attention_bias=True,
        hidden_act="gelu",
        tie_word_embeddings=True,
        attention_dropout=0.1,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
    )
    small = tiny_config(config)
    assert (small.num_attention_heads, small.num_key_value_heads, small.num_hidden_layers) == (4, 2, 1)
    assert small.attention_bias and small.hidden_act == "gelu" and small.tie_word_embeddings
    assert small.attention_dropout == 0.1 and small.rope_parameters["rope_type"] == "yarn"
    for heads, expected in ((32, 4), (1, 1)):  # multi-head and multi-query attention
        assert tiny_config(LlamaConfig(num_key_value_heads=heads)).num_key_value_heads == expected


def test_odd_sizes_become_sizes_that_fit():
    config = LlamaConfig(vocab_size=67, hidden_size=20, intermediate_size=35, num_attention_heads=2)
    small = tiny_config(config)
    assert count_parameters(small) == count_parameters(tiny_config(LlamaConfig()))
    assert small.max_position_embeddings == MAX_POSITIONS


def test_long_rope_has_a_factor_for_each_pair_of_channels():
    factors = [1.0 + i / 48 for i in range(48)]
    small = tiny_config(
        CONFIG_MAPPING["phi3"](
            rope_parameters={
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 4096,
            }
        )
    )
    AutoModelForCausalLM.from_config(small)(torch.zeros(1, 8, dtype=torch.long))


def test_a_configuration_that_transformers_cannot_build_is_named():
    with pytest.raises(ValueError, match="model: transformers cannot build this ministral model .TypeError"):
        tiny_config(CONFIG_MAPPING["ministral"](head_dim=None))

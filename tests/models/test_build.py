"""Models from presets, configurations and checkpoints."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

from relora_ds.config import ModelConfig, preset_names
from relora_ds.models.build import build_config, build_model, count_parameters, meta_model
from relora_ds.models.tiny import MAX_POSITIONS, tiny_config

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "vocab_size": 100,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama_9m", 9.0),
        ("llama_20m", 19.5),
        ("llama_60m", 58.1),
        ("llama_130m", 134.1),
        ("llama_350m", 368.0),
        ("llama_1b", 1339.1),
        ("llama_7b", 6738.4),
    ],
)
def test_presets_have_the_papers_sizes(name, millions):
    config = build_config(ModelConfig(preset=name), vocab_size=32_000, seq_len=256)
    assert round(count_parameters(config) / 1e6, 1) == millions


@pytest.mark.parametrize("name", preset_names())
def test_presets_rotate_whole_heads(name):
    config = build_config(ModelConfig(preset=name), vocab_size=100, seq_len=4096)
    assert config.hidden_size == config.head_dim * config.num_attention_heads and config.head_dim % 2 == 0
    assert config.max_position_embeddings == 4096 and config.use_cache is False


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_decides_the_weights_and_nothing_else(family, tmp_path):
    FAMILIES[family].save_pretrained(tmp_path)
    model = ModelConfig(name_or_path=str(tmp_path))
    config = build_config(model, vocab_size=50, seq_len=64, eos_id=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (build_model(config, model, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert a.dtype == torch.float32 and a.device.type == "cpu" and torch.equal(a, b)
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert one.config.vocab_size == 50 and one.config.eos_token_id == 3
    assert sum(p.numel() for p in one.parameters()) == count_parameters(config)
    assert all(p.is_meta for p in meta_model(config).parameters())
    assert one(torch.zeros(1, 64, dtype=torch.long)).logits.shape == (1, 64, 50)


def test_a_json_file_is_a_configuration(tmp_path):
    path = tmp_path / "llama.json"
    path.write_text(json.dumps({"model_type": "llama", **SMALL}))
    assert build_config(ModelConfig(name_or_path=str(path)), vocab_size=77, seq_len=8).vocab_size == 77
    path.write_text(json.dumps(SMALL))
    with pytest.raises(ValueError, match="model.name_or_path: .* has no readable configuration"):
        build_config(ModelConfig(name_or_path=str(path)), vocab_size=77, seq_len=8)


def test_a_nested_language_model_gets_the_vocabulary_and_its_limit(tmp_path):
    small = tiny_config(CONFIG_MAPPING["gemma3"]())
    small.save_pretrained(tmp_path)
    model = ModelConfig(name_or_path=str(tmp_path))
    config = build_config(model, vocab_size=50, seq_len=16, eos_id=3)
    assert meta_model(config).get_input_embeddings().weight.shape[0] == 50
    assert config.text_config.eos_token_id == 3 and config.text_config.use_cache is False
    with pytest.raises(ValueError, match=f"data.seq_len: 129 is above the {MAX_POSITIONS} positions"):
        build_config(model, vocab_size=50, seq_len=129)
    with pytest.raises(ValueError, match="a vocabulary of 256, the tokenizer has 300"):
        build_config(ModelConfig(name_or_path=str(tmp_path), init="pretrained"), vocab_size=300, seq_len=16)


def test_a_family_without_a_start_token_that_must_have_one(tmp_path):
    tiny_config(CONFIG_MAPPING["mllama"]()).save_pretrained(tmp_path)
    config = build_config(ModelConfig(name_or_path=str(tmp_path)), vocab_size=50, seq_len=16, eos_id=3)
    assert config.text_config.bos_token_id == 0 and config.text_config.pad_token_id is None


def test_no_limit_of_positions(tmp_path):
    CONFIG_MAPPING["xlnet"]().save_pretrained(tmp_path)
    assert build_config(ModelConfig(name_or_path=str(tmp_path)), vocab_size=50, seq_len=4096).vocab_size == 50


def test_pretrained_weights_arrive(tmp_path):
    trained = AutoModelForCausalLM.from_config(FAMILIES["llama"]).to(torch.bfloat16)
    trained.save_pretrained(tmp_path)
    model = ModelConfig(name_or_path=str(tmp_path), init="pretrained")
    config = build_config(model, vocab_size=98, seq_len=64)  # two padding rows
    loaded = build_model(config, model, seed=0)
    assert loaded.dtype == torch.float32 and loaded.config.vocab_size == 100
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float()), name
    for vocab_size in (101, 100_000):
        with pytest.raises(ValueError, match=f"vocabulary of 100, the tokenizer has {vocab_size}; use data.tokenizer="):
            build_config(model, vocab_size=vocab_size, seq_len=64)


def test_mistakes(tmp_path):
    FAMILIES["llama"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="data.seq_len: 65 is above the 64 positions"):
        build_config(ModelConfig(name_or_path=str(tmp_path)), vocab_size=100, seq_len=65)
    with pytest.raises(ValueError, match="did you mean llama_60m"):
        build_config(ModelConfig(preset="llama_60"), vocab_size=100, seq_len=8)
    with pytest.raises(ValueError, match="neither is set"):
        build_config(ModelConfig(), vocab_size=100, seq_len=8)

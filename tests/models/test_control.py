"""The Control baseline has as many parameters as the low-rank run trains, and still works."""

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config, Qwen3Config

from relora_ds.config import ModelConfig
from relora_ds.models.build import build_config, build_model, count_parameters
from relora_ds.models.control_shape import control_config

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "vocab_size": 256,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "qwen2_tied": Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=64),
}


@pytest.mark.each_value_once
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", [0.3, 0.7, 0.99])
def test_within_one_percent_and_runs(family, part):
    config = FAMILIES[family]
    wanted = int(count_parameters(config) * part)
    control = control_config(config, wanted)
    model = build_model(control, ModelConfig(), seed=0)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(wanted, rel=0.01)
    assert model(torch.zeros(1, 8, dtype=torch.long)).logits.shape == (1, 8, 256)
    for name in ("num_hidden_layers", "num_attention_heads", "vocab_size", "model_type"):
        assert getattr(control, name) == getattr(config, name)
    assert control.to_dict() == control_config(config, wanted).to_dict()


@pytest.mark.parametrize(
    ("preset", "wanted"), [("llama_60m", 42_800_000), ("llama_350m", 125_000_000), ("llama_1b", 250_000_000)]
)
def test_the_papers_sizes_keep_their_proportions(preset, wanted):
    config = build_config(ModelConfig(preset=preset), vocab_size=32_000, seq_len=256)
    control = control_config(config, wanted)
    assert count_parameters(control) == pytest.approx(wanted, rel=0.002)
    assert control.intermediate_size / control.hidden_size == pytest.approx(
        config.intermediate_size / config.hidden_size, rel=0.25
    )


def test_the_full_size_is_the_full_network():
    config = FAMILIES["llama"]
    assert control_config(config, count_parameters(config)).to_dict() == config.to_dict()


def test_sizes_that_no_shape_has():
    config = FAMILIES["llama"]
    full = count_parameters(config)
    with pytest.raises(ValueError, match=f"need {full + 1:,} parameters.* whole network has {full:,}"):
        control_config(config, full + 1)
    with pytest.raises(ValueError, match="need 100 parameters, but the smallest network with 3 layers"):
        control_config(config, 100)
    with pytest.raises(ValueError, match="cannot shrink a gpt2 model.* has no intermediate_size"):
        control_config(GPT2Config(n_embd=32, n_head=4, n_layer=1), 1000)

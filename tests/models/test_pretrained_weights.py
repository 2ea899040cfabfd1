"""Pretrained weights, one tensor at a time, or whole where transformers converts them."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, GenerationConfig, LlamaConfig

from relora_ds.config import ModelConfig
from relora_ds.models.build import initial_weights, model_without_values
from relora_ds.models.loading import from_config, load_config, load_weights
from relora_ds.models.pretrained_weights import StoredWeights, pretrained_weights
from relora_ds.models.tiny import tiny_config
from relora_ds.models.whole_weights import WholeWeights
from relora_ds.models.without_values import named_tensors
from tests.models.test_random_weights import BUILT, small_configuration

SMALL = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_hidden_layers=2,
    max_position_embeddings=64,
    vocab_size=100,
)

NOT_LOADED = ("emu3", "mllama")  # transformers saves their text part's configuration, of which it makes no model


def saved(directory, config=SMALL, **options):
    """A model of `config` whose weights are in `directory`, in bf16."""
    model = from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, **options)
    return model


def weights_in(directory):
    return pretrained_weights(directory, load_config(directory, False), False)


def values(weights) -> dict[str, torch.Tensor]:
    return {name: weights.read(name) for name in weights.shapes}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name].to(one[name].dtype))] == []


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_every_rank_reads_the_tensor_that_it_is_asked_for(shard, tmp_path):
    model = saved(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    weights = weights_in(tmp_path)
    assert isinstance(weights, StoredWeights) and weights.owners is None
    assert {weights.read(name).dtype for name in weights.shapes} == {torch.float32}
    assert_equal(values(weights), named_tensors(model))


def test_what_is_read_is_not_the_files_own_memory(tmp_path):
    saved(tmp_path).float().save_pretrained(tmp_path)
    value = weights_in(tmp_path).read("model.norm.weight")
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:  # in place: what is mapped into memory changes with it
        file.write(bytes(path.stat().st_size))
    assert value.all()


def test_other_names_are_found(tmp_path):
    """transformers renames GPT-NeoX's head, and what the files of a base model have without its prefix."""
    model = saved(tmp_path / "a", tiny_config(CONFIG_MAPPING["gpt_neox"]()))
    assert "embed_out.weight" in load_file(tmp_path / "a" / "model.safetensors")
    weights = weights_in(tmp_path / "a")
    assert isinstance(weights, StoredWeights)
    assert_equal(values(weights), named_tensors(model))
    model = saved(tmp_path / "b", LlamaConfig(**{**SMALL.to_dict(), "tie_word_embeddings": True}))
    model.model.save_pretrained(tmp_path / "b")
    assert "norm.weight" in load_file(tmp_path / "b" / "model.safetensors")
    weights = weights_in(tmp_path / "b")
    assert isinstance(weights, StoredWeights)
    assert_equal(values(weights), named_tensors(model))


def experts_apart(directory):
    return saved(directory, tiny_config(CONFIG_MAPPING["mixtral"]()))


def pickled(directory):
    model = saved(directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return model


def in_8_bit(directory):
    model = saved(directory)
    with torch.no_grad():
        model.model.norm.weight.copy_(model.model.norm.weight.to(torch.float8_e4m3fn))
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (experts_apart, "experts.0.w1.weight is converted"),
        (pickled, "its weights are pickled"),
        (in_8_bit, "model.norm.weight is stored in 8 bit"),
    ],
)
def test_what_transformers_converts_it_loads_whole_on_rank_0(write, reason, tmp_path, caplog):
    caplog.set_level(logging.INFO, "relora_ds")
    model = write(tmp_path)
    weights = weights_in(tmp_path)
    assert isinstance(weights, WholeWeights) and set(weights.owners.values()) == {0}
    assert reason in caplog.text and "so transformers loads it whole, on rank 0" in caplog.text
    assert weights.owners.keys() == weights.shapes.keys() and not weights._loaded
    assert_equal(values(weights), named_tensors(model))
    assert not weights._loaded  # given away


def test_a_quantized_model_is_left_to_transformers(tmp_path, caplog):
    caplog.set_level(logging.INFO, "relora_ds")
    saved(tmp_path)
    config = load_config(tmp_path, False)
    config.quantization_config = {"quant_method": "fp8"}
    assert isinstance(pretrained_weights(tmp_path, config, False), WholeWeights)
    assert "its configuration has quantization_config" in caplog.text


def test_missing_weights_are_refused_by_name_before_any_is_read(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights of 2 parameters are missing \(first: lm_head.weight\)"):
        weights_in(tmp_path)
    with pytest.raises(ValueError, match=r"the weights of 2 parameters are missing \(first: lm_head.weight\)"):
        load_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        weights_in(tmp_path)


def test_other_shapes_are_refused(tmp_path):
    saved(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "intermediate_size": 60}))
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight is \(\d+, \d+\) there instead of \(60, \d+\)"):
        weights_in(tmp_path)


def test_the_settings_for_generation_come_with_the_weights(tmp_path):
    saved(tmp_path)
    GenerationConfig(do_sample=True, temperature=0.3).save_pretrained(tmp_path)
    recipe = ModelConfig(name_or_path=str(tmp_path), init="pretrained")
    config = load_config(tmp_path, False)
    assert model_without_values(config, recipe).generation_config.temperature == 0.3
    assert isinstance(initial_weights(config, recipe, 0), StoredWeights)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in BUILT if name not in NOT_LOADED])
def test_every_family_gets_the_weights_that_were_saved(variant, tmp_path):
    model = saved(tmp_path, small_configuration(variant))
    assert_equal(values(weights_in(tmp_path)), named_tensors(model))

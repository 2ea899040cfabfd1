"""Random weights, one tensor at a time."""

import logging

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, GPT2Config, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from relora_ds.config import ModelConfig
from relora_ds.models import loading
from relora_ds.models.build import build_model, model_without_values
from relora_ds.models.loading import from_config
from relora_ds.models.random_weights import RandomWeights
from relora_ds.models.tiny import tiny_config
from relora_ds.models.without_values import named_tensors, parameters_on_meta
from tests.models.test_families import REFUSED, VARIANTS, small_configuration

SMALL = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_hidden_layers=2,
    max_position_embeddings=64,
    vocab_size=100,
)
# Families of which transformers makes a model.
BUILT = [name for name in VARIANTS if "cannot build" not in REFUSED.get(name, "") and REFUSED.get(name) != "timm"]


def test_a_tensor_depends_on_the_seed_and_its_name_alone():
    one, other = RandomWeights(SMALL, seed=3), RandomWeights(SMALL, seed=3)
    names = list(one.shapes)
    backwards = {name: other.read(name) for name in reversed(names)}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert all(torch.equal(one.read(name), backwards[name]) for name in names)
    assert torch.equal(torch.get_rng_state(), state)
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    assert not torch.equal(backwards[up], backwards[gate])
    assert not torch.equal(backwards[up], RandomWeights(SMALL, seed=4).read(up))
    deeper = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 3})
    assert torch.equal(backwards[up], RandomWeights(deeper, seed=3).read(up))


def test_a_model_is_built_of_the_same_values():
    model, weights = build_model(SMALL, ModelConfig(), seed=3), RandomWeights(SMALL, seed=3)
    assert named_tensors(model).keys() == weights.shapes.keys() and weights.owners is None
    assert all(torch.equal(tensor, weights.read(name)) for name, tensor in named_tensors(model).items())
    assert model(torch.zeros(1, 8, dtype=torch.long)).logits.isfinite().all()


def test_drawing_leaves_nothing_behind():
    weights = RandomWeights(SMALL, seed=0)
    for name in weights.shapes:
        weights.read(name)
    assert all(parameter.is_meta for parameter in weights._model.parameters())


def test_a_parent_overrides_what_its_child_draws():
    config = GPT2Config(n_embd=64, n_layer=8, n_head=4, vocab_size=100, n_positions=32)
    weights = RandomWeights(config, seed=0)  # c_proj is drawn again by the block, scaled by the depth
    first, last = (weights.read(f"transformer.h.0.mlp.{name}.weight").std().item() for name in ("c_fc", "c_proj"))
    assert first == pytest.approx(0.02, rel=0.05) and last == pytest.approx(0.02 / 16**0.5, rel=0.05)


def test_what_torch_skips_on_the_meta_device_is_traced():
    """`trunc_normal_` does nothing there; ModernBERT's embeddings are drawn by it over what nn.Embedding drew."""
    weights = RandomWeights(tiny_config(CONFIG_MAPPING["modernbert-decoder"]()), seed=0)
    assert weights.read("model.embeddings.tok_embeddings.weight").abs().max() <= 2 * 0.02


def test_a_padding_row_is_empty_and_ties_stay():
    tied = LlamaConfig(**{**SMALL.to_dict(), "tie_word_embeddings": True, "pad_token_id": 5})
    model = build_model(tied, ModelConfig(), seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight[5].any() and model.lm_head.weight[4].all()
    assert "lm_head.weight" not in RandomWeights(tied, seed=0).shapes


def test_what_a_constructor_ties_stays_tied():
    with parameters_on_meta():
        model = nn.Module()
        weight = nn.Parameter(torch.ones(2))
        model.one, model.other = weight, weight
        model.after = weight
    assert model.one is model.other is model.after is weight and weight.is_meta


def test_what_a_constructor_computes_comes_from_rank_0(caplog):
    caplog.set_level(logging.INFO, "relora_ds")
    config = tiny_config(CONFIG_MAPPING["apertus"]())
    weights, name = RandomWeights(config, seed=0), "model.layers.0.mlp.act_fn.alpha_p"
    assert set(weights.owners) == {n for n in weights.shapes if "alpha" in n} and set(weights.owners.values()) == {0}
    assert "cannot be drawn one at a time; rank 0 builds them together" in caplog.text
    assert torch.equal(weights.read(name), from_config(config).get_parameter(name))
    assert len(weights._built) < len(weights.owners)


class Mixed(LlamaForCausalLM):
    """Scales one matrix by the norm of another."""

    __module__ = "transformers.models.mixed"  # as if it were one of transformers' own

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is getattr(self, "lm_head", None):
            module.weight.mul_(self.model.embed_tokens.weight.norm())


class Custom(LlamaForCausalLM):
    """Other people's code."""


class Curious(LlamaForCausalLM):
    """Looks at a value while it is built, which nothing on the meta device has."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.scale = self.lm_head.weight.detach().norm().item()


@pytest.mark.parametrize(("family", "together"), [(Mixed, 1), (Custom, 21), (Curious, 21)])
def test_what_may_depend_on_several_weights_is_built_whole_on_rank_0(family, together, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "relora_ds")
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_config", lambda config, **_: family(config))
    weights = RandomWeights(SMALL, seed=0)
    assert len(weights.owners) == together and "lm_head.weight" in weights.owners
    assert "rank 0 builds the model whole" in caplog.text
    assert ("every rank builds it whole for a moment" in caplog.text) == (family is Curious)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = family(SMALL)
    assert torch.equal(weights.read("lm_head.weight"), whole.lm_head.weight)
    assert all(parameter.is_meta for parameter in model_without_values(SMALL).parameters())
    built = build_model(SMALL, ModelConfig(), seed=0)
    assert torch.equal(built.lm_head.weight, whole.lm_head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("variant", BUILT)
def test_every_family_gets_the_weights_that_transformers_gives_it(variant, monkeypatch):
    config = small_configuration(variant)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = from_config(config, dtype=torch.float32)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nothing is written to is NaN
    try:
        weights, empty = RandomWeights(config, seed=0), model_without_values(config)
        values = {name: weights.read(name) for name in weights.shapes}
    finally:
        torch.use_deterministic_algorithms(False)
    assert values.keys() == named_tensors(expected).keys()
    assert [name for name, value in named_tensors(expected).items() if not same_distribution(value, values[name])] == []
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [name for name, buffer in expected.named_buffers() if not torch.equal(buffer, empty.get_buffer(name))] == []


def same_distribution(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, or their means and deviations are within six standard errors."""
    if one.shape != other.shape or one.dtype != other.dtype or not other.isfinite().all():
        return False
    if torch.equal(one, other):
        return True
    if one.numel() < 16:  # too few to tell
        return one.is_floating_point()
    (std, mean), (other_std, other_mean) = (torch.std_mean(tensor.float()) for tensor in (one, other))
    bound = 6 * (2 / one.numel()) ** 0.5
    return bool((std - other_std).abs() <= bound * std and (mean - other_mean).abs() <= bound * std)

"""The CoLA network against numbers that do not come from here, its first values, and what CoLA-M keeps of it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from relora_ds.architectures import ReLoRACoLAConfig, ReLoRACoLAForCausalLM
from relora_ds.architectures.relora_cola import CoLALinear
from relora_ds.models import recompute
from relora_ds.models.random_weights import RandomWeights
from relora_ds.planning.activations import _LiveBytes
from tests.models.test_recompute import ATTENTION, Executed, step
from tests.small_models import batch, cola

FILE = Path(__file__).parents[1] / "fixtures" / "cola" / "vectors.json"
VECTORS = json.loads(FILE.read_text(encoding="utf-8"))
# As a LLaMA may be: fewer heads for keys, one weight for embeddings and head, biases.
SHAPES = {
    "plain": {},
    "grouped": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
}


def tensor(name: str) -> torch.Tensor:
    return torch.tensor(VECTORS[name], dtype=torch.float64)


def test_a_projection_and_its_gradients():
    A, B, x = tensor("A"), tensor("B"), tensor("X").requires_grad_()
    layer = CoLALinear(*A.shape[:1], *B.shape[1:], A.shape[1]).double()
    with torch.no_grad():
        layer.A.copy_(A.t())
        layer.B.copy_(B.t())
    y = layer(x)
    y.backward(tensor("dY"))
    for found, name in ((y, "Y"), (x.grad, "dX"), (layer.A.grad.t(), "dA"), (layer.B.grad.t(), "dB")):
        torch.testing.assert_close(found, tensor(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", VECTORS["std"])
def test_the_spread_of_the_first_values(shape):
    """Drawn as an engine's weights are."""
    sizes, r = shape.split(" r")
    small, large = map(int, sizes.split("x"))
    config = ReLoRACoLAConfig(
        hidden_size=small, intermediate_size=large, num_hidden_layers=1, vocab_size=2000, cola_r=int(r)
    )
    weights = RandomWeights(config, seed=0)
    assert weights.owners is None, "every rank draws every tensor by itself"
    for name in ("gate_proj.A", "gate_proj.B", "down_proj.A", "down_proj.B"):
        value = weights.read(f"model.layers.0.mlp.{name}")
        assert value.std().item() == pytest.approx(VECTORS["std"][shape], rel=0.01), name
        assert value.mean().abs() < 0.01 * VECTORS["std"][shape]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert weights.read(name).std().item() == pytest.approx(0.02, rel=0.01)


def test_a_first_value_depends_on_the_seed_and_the_name_alone():
    config, deeper = cola().config, cola(num_hidden_layers=4).config
    name, other = "model.layers.0.mlp.up_proj.A", "model.layers.1.mlp.up_proj.A"
    first = RandomWeights(config, seed=3)
    assert first.shapes.keys() == dict(cola().named_parameters()).keys()
    value = first.read(name)
    assert torch.equal(value, RandomWeights(deeper, seed=3).read(name))
    assert not torch.equal(value, first.read(other))
    assert not torch.equal(value, RandomWeights(config, seed=4).read(name))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_linear_but_the_head_is_two_factors(shape):
    model = cola(**SHAPES[shape])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CoLALinear)}
    assert Counter(name.rpartition(".")[2] for name in layers) == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), model.config.num_hidden_layers
    )
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]
    assert all((layer.bias is not None) == (shape == "biased") for layer in layers.values())
    loss, gradients = step(model)
    assert loss.isfinite() and all(gradient.any() for gradient in gradients.values())
    assert gradients.keys() == dict(model.named_parameters()).keys()


def test_auto_classes_know_it_and_generate_with_a_cache():
    config = AutoConfig.for_model(**{**cola().config.to_dict(), "use_cache": True})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert type(config) is ReLoRACoLAConfig and type(model) is ReLoRACoLAForCausalLM
    prompt = batch(0, 1)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    with_cache, without = (model.generate(prompt, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert with_cache.shape[1] == prompt.shape[1] + 5 and torch.equal(with_cache, without)


@pytest.mark.parametrize("mode", ["full", "selective", "cheap", "low_rank"])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_the_same_to_the_bit(shape, mode):
    """In the mode low_rank this is CoLA-M."""
    for attention in ("eager", "sdpa"):
        found = []
        for each in ("none", mode):
            model = cola(**SHAPES[shape])
            model.set_attn_implementation(attention)
            found.append(step(recompute.apply(model.train(), each)))
        (loss, gradients), (loss_then, gradients_then) = found
        assert torch.equal(loss, loss_then) and gradients.keys() == gradients_then.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, gradients_then[name]), name


def test_what_cola_m_repeats():
    """Of each projection silu and B, and not A; attention, norms, the feed-forward's own activation."""
    counts = []
    for mode in ("none", "low_rank"):
        model = cola().train()
        model.set_attn_implementation("sdpa")
        loss = recompute.apply(model, mode)(input_ids=batch(0, 3), labels=batch(0, 3)).loss
        with Executed() as executed:
            loss.backward()
        counts.append(executed.count)
    found, num_layers = counts[1] - counts[0], model.config.num_hidden_layers
    # The last product, down_proj's B, is nobody's input within the layer: repetition ends before it.
    assert found["aten::mm"] == 6 * num_layers and found[ATTENTION] == num_layers
    assert found["aten::silu"] == 8 * num_layers and found["aten::rsqrt"] == 2 * num_layers


def kept_by_a_layer(mode: str) -> float:
    """Elements that one more layer keeps from forward to backward, for each token."""
    kept = []
    for num_layers in (2, 3):
        with FakeTensorMode():
            model = cola(hidden_size=64, intermediate_size=176, num_hidden_layers=num_layers, cola_r=8).train()
            model.set_attn_implementation("sdpa")
            recompute.apply(model, mode)
            tokens = torch.zeros(4, 32, dtype=torch.long)
            with _LiveBytes() as live:
                loss = model(input_ids=tokens, labels=tokens).loss
                kept.append(live.now)
            assert loss.requires_grad
    return (kept[1] - kept[0]) / (4 * tokens.numel())


def test_what_cola_m_keeps():
    """A layer's input, and seven products of width r."""
    assert kept_by_a_layer("full") == 64
    assert kept_by_a_layer("low_rank") == 64 + 7 * 8
    assert kept_by_a_layer("none") > 5 * kept_by_a_layer("low_rank")

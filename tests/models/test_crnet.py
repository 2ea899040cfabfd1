"""The CR-Net network against numbers that do not come from here, its first values, and generation with a cache."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from relora_ds.architectures import ReLoRACRNetConfig, ReLoRACRNetForCausalLM
from relora_ds.architectures.relora_crnet import CRNetLinear, scale
from relora_ds.models import recompute
from relora_ds.models.random_weights import RandomWeights
from tests.models.test_recompute import step
from tests.small_models import batch, crnet

FILE = Path(__file__).parents[1] / "fixtures" / "crnet" / "vectors.json"
VECTORS = json.loads(FILE.read_text(encoding="utf-8"))
# As a LLaMA may be: fewer heads for keys, one weight for embeddings and head, biases.
SHAPES = {
    "plain": {},
    "grouped": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "one layer": {"num_hidden_layers": 1},
}


def tensor(name: str) -> torch.Tensor:
    return torch.tensor(VECTORS[name], dtype=torch.float64)


def equal(found: torch.Tensor | None, name: str) -> None:
    assert found is not None
    torch.testing.assert_close(found, tensor(name), rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


def test_three_layers_of_a_projection_as_a_function():
    """y = x·A·B, A `[in, r]`, as the vectors have it."""
    X, W1, A, B, beta = (tensor(name).requires_grad_() for name in ("X", "W1", "A", "B", "beta"))
    y = [X[0] @ W1]
    for layer in range(2):
        y.append(scale(beta[layer]) * y[-1] + X[layer + 1] @ A[layer] @ B[layer])
    y[-1].backward(tensor("dY3"))
    for layer, found in enumerate(y):
        equal(found, f"Y{layer + 1}")
    equal(W1.grad, "dW1")
    for layer in range(2):
        equal(A.grad[layer], f"dA{layer + 2}")
        equal(B.grad[layer], f"dB{layer + 2}")
        equal(beta.grad[layer], f"dbeta{layer + 2}")


def test_three_layers_of_a_projection_as_modules():
    X, W1, A, B, beta = (tensor(name) for name in ("X", "W1", "A", "B", "beta"))
    first = nn.Linear(*W1.shape, bias=False).double()
    others = [CRNetLinear(*W1.shape, A.shape[2]).double() for _ in beta]
    with torch.no_grad():
        first.weight.copy_(W1.t())
        for layer, module in enumerate(others):
            module.A.copy_(A[layer].t())
            module.B.copy_(B[layer].t())
            module.beta.fill_(beta[layer])
    y = [first(X[0])]
    for module, x in zip(others, X[1:], strict=True):
        y.append(module(x, y[-1]))
    y[-1].backward(tensor("dY3"))
    for layer, found in enumerate(y):
        equal(found, f"Y{layer + 1}")
    equal(first.weight.grad.t(), "dW1")
    for number, module in enumerate(others, 2):
        equal(module.A.grad.t(), f"dA{number}")
        equal(module.B.grad.t(), f"dB{number}")
        equal(module.beta.grad.squeeze(), f"dbeta{number}")


def test_no_beta_is_dead():
    """f has no zero, and a gradient of 1 everywhere: the sign of 0 would stop both."""
    beta = torch.tensor([0.8, 0.0, -0.0, -0.5], requires_grad=True)
    found = scale(beta)
    torch.testing.assert_close(found, torch.tensor([0.800001, 1e-6, 1e-6, -0.500001]), rtol=1e-7, atol=0)
    found.sum().backward()
    assert torch.equal(beta.grad, torch.ones(4))


def test_the_first_values():
    """Drawn as an engine's weights are: the factors' as CoLA's, the first layer's as LLaMA's, every β the same."""
    config = ReLoRACRNetConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=2000, crnet_r=64, crnet_beta=0.75
    )
    weights = RandomWeights(config, seed=0)
    assert weights.owners is None, "every rank draws every tensor by itself"
    for name in ("gate_proj.A", "gate_proj.B", "down_proj.A", "down_proj.B"):
        expected = (64 * (256 + 512)) ** -0.25
        assert weights.read(f"model.layers.1.mlp.{name}").std().item() == pytest.approx(expected, rel=0.02), name
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight", "lm_head.weight"):
        assert weights.read(name).std().item() == pytest.approx(0.02, rel=0.02), name
    assert weights.read("model.layers.1.self_attn.q_proj.beta").tolist() == [0.75]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_linear_of_the_layers_after_the_first_is_factors(shape):
    model = crnet(**SHAPES[shape])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CRNetLinear)}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    later = model.config.num_hidden_layers - 1
    assert Counter(name.rpartition(".")[2] for name in layers) == (dict.fromkeys(names, later) if later else {})
    whole = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert whole[-1] == "lm_head" and Counter(name.rpartition(".")[2] for name in whole[:-1]) == dict.fromkeys(names, 1)
    assert all(name.startswith("model.layers.0.") for name in whole[:-1])
    assert all((layer.bias is not None) == (shape == "biased") for layer in layers.values())
    loss, gradients = step(model)
    assert loss.isfinite() and all(gradient.any() for gradient in gradients.values())
    assert gradients.keys() == dict(model.named_parameters()).keys()


def test_the_network_is_what_its_equations_say():
    """Written out, with plain attention, from the network's own parameters."""
    model, ids = crnet(num_key_value_heads=1).double(), batch(0, 2)
    config, decoder = model.config, model.model
    x, before = decoder.embed_tokens(ids), {}
    cos, sin = decoder.rotary_emb(x, torch.arange(ids.shape[1])[None])

    def rotated(t):
        half = t.shape[-1] // 2
        return t * cos[:, None] + torch.cat((-t[..., half:], t[..., :half]), -1) * sin[:, None]

    def y(name, linear, inputs):
        if name in before:
            change = inputs @ linear.A.t() @ linear.B.t()
            before[name] = (linear.beta + 1e-6 * linear.beta.sign()) * before[name] + change
        else:
            before[name] = inputs @ linear.weight.t()
        return before[name]

    def heads(t):
        return t.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    for layer in decoder.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (heads(y(name, getattr(attention, f"{name}_proj"), normed)) for name in "qkv")
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + y("o", attention.o_proj, mixed.transpose(1, 2).flatten(-2))
        mlp, normed = layer.mlp, layer.post_attention_layernorm(x)
        gate, up = (y(name, getattr(mlp, f"{name}_proj"), normed) for name in ("gate", "up"))
        x = x + y("down", mlp.down_proj, F.silu(gate) * up)
    expected = model.lm_head(decoder.norm(x))
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)  # norms are in fp32


def test_sums_over_layers_are_in_fp32_where_weights_are_in_bf16():
    model, carried = crnet().bfloat16(), []
    for layer in model.model.layers[:-1]:
        layer.register_forward_hook(lambda layer, args, output: carried.append(output))
    model(input_ids=batch(0, 2))
    assert [hidden.dtype for hidden, _ in carried] == [torch.bfloat16] * 2
    assert {y.dtype for _, ys in carried for y in ys} == {torch.float32}


def test_auto_classes_know_it_and_generate_with_a_cache():
    config = AutoConfig.for_model(**{**crnet().config.to_dict(), "use_cache": True})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert type(config) is ReLoRACRNetConfig and type(model) is ReLoRACRNetForCausalLM
    prompt = batch(0, 2)
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0  # padded on the left
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    without = model.generate(prompt, use_cache=False, **settings)
    assert without.shape[1] == prompt.shape[1] + 5
    for cache in (None, "static"):
        assert torch.equal(model.generate(prompt, use_cache=True, cache_implementation=cache, **settings), without)
    with torch.no_grad():
        whole = model(input_ids=without).logits
        first = model(input_ids=without[:, :9], use_cache=True)
        held = {"cache": first.cache} if "cache" in first else {"past_key_values": first.past_key_values}
        rest = model(input_ids=without[:, 9:], use_cache=True, **held).logits
    torch.testing.assert_close(rest, whole[:, 9:], rtol=1e-5, atol=1e-6)


def test_hidden_states_and_attention_weights_are_given():
    model = crnet()
    model.set_attn_implementation("eager")
    found = model(input_ids=batch(0, 2), output_hidden_states=True, output_attentions=True)
    assert [tuple(each.shape) for each in found.hidden_states] == [(2, 12, 20)] * 4
    assert [tuple(each.shape) for each in found.attentions] == [(2, 2, 12, 12)] * 3


@pytest.mark.parametrize("mode", ["full", "selective", "cheap", "low_rank"])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_the_same_to_the_bit(shape, mode):
    for attention in ("eager", "sdpa"):
        found = []
        for each in ("none", mode):
            model = crnet(**SHAPES[shape])
            model.set_attn_implementation(attention)
            found.append(step(recompute.apply(model.train(), each)))
        (loss, gradients), (loss_then, gradients_then) = found
        assert torch.equal(loss, loss_then) and gradients.keys() == gradients_then.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, gradients_then[name]), name

"""Weights in other layouts than a linear's: Conv1D keeps Wᵀ, and experts are stacked, each with a pair of its own."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.base_layer import initial_A
from relora_ds.lowrank.formats import format_named
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.parameter import ReLoRAParameter
from relora_ds.lowrank.wrap import lowrank_layers, merge_and_unwrap, problems, warnings, wrap
from tests.small_models import VOCAB, batch, gpt2, llama, mixtral

EXPERTS = ReLoRAConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=["gate_up_proj", "experts.down_proj"])
FORMATS = ["dense", "bf16", "int8", "fp8", "fp8_both_layouts", "nf4", "nf4_double"]


def conv1d_layer(dropout: float = 0.0) -> tuple[Conv1D, ReLoRALinear]:
    torch.manual_seed(0)
    plain = nn.Sequential(Conv1D(48, 32))
    nn.init.normal_(plain[0].bias)
    config = ReLoRAConfig(r=4, lora_alpha=8, lora_dropout=dropout)
    layer = wrap(copy.deepcopy(plain), config)[0]
    nn.init.normal_(layer.lora_B)
    return plain[0], layer


@pytest.mark.parametrize("format", FORMATS)
def test_a_conv1d_computes_and_differentiates_with_its_own_layout(format):
    plain, layer = conv1d_layer()
    format = format_named(format)
    stored = format.quantize(plain.weight.detach(), torch.float32)
    weight = format.dequantize(stored, layer.weight_shape, torch.float32)
    layer.store_weight(stored, format, as_buffer=False)
    x = torch.randn(3, 5, 32, requires_grad=True)
    expected_x = x.detach().clone().requires_grad_()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    expected = expected_x @ weight + plain.bias + 2 * expected_x @ A.t() @ B.t()
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in ((x, expected_x), (layer.lora_A, A), (layer.lora_B, B)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.merged_weight(), weight + 2 * (B @ A).t().detach())


def test_a_conv1d_with_dropout_keeps_its_layout():
    plain, layer = conv1d_layer(dropout=0.5)
    nn.init.zeros_(layer.lora_B)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer.train()(x), plain(x))


def test_conv1d_is_a_linear_for_all_linear_and_comes_back_as_conv1d():
    model = gpt2()
    kinds = {name: type(module) for name, module in model.named_modules()}
    wrap(model, ReLoRAConfig(r=2))
    assert {name.split(".", 3)[-1] for name in lowrank_layers(model)} == {
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    }
    assert {name: type(module) for name, module in merge_and_unwrap(model).named_modules()} == kinds


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_a_pair_of_its_own(transposed, base):
    torch.manual_seed(0)
    shape = (3, 6, 5) if transposed else (3, 5, 6)
    weight = nn.Parameter(torch.randn(shape))
    layer = ReLoRAParameter(torch.Size(shape), weight if base else None, r=2, lora_alpha=4, transposed=transposed)
    assert layer.lora_A.shape == (3, 2, 6) and layer.lora_B.shape == (3, 5, 2)
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    updates = [2 * B[e] @ A[e] for e in range(3)]
    expected = torch.stack([update.t() if transposed else update for update in updates])
    expected = expected + weight.detach() if base else expected
    x = torch.randn(4)
    total, passed = layer(x)
    assert passed is x, "an input that needs no gradient would get one"
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(layer.merged_weight(), expected.detach())
    total.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, A.grad)
    torch.testing.assert_close(layer.lora_B.grad, B.grad)


def test_experts_draw_different_values_of_one_distribution():
    layer = lowrank_layers(wrap(mixtral(), EXPERTS))["model.layers.0.mlp.experts.down_proj"]
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(layer.lora_A, initial_A(3 * 4, 16, seed=0, restart=0, name=name).view(3, 4, 16))
    assert not torch.equal(layer.lora_A[0], layer.lora_A[1])
    assert layer.lora_A.abs().max() <= 1 / 16**0.5  # Kaiming's bound for 16 inputs, not for 16 times anything


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8", "fp8_both_layouts", "nf4"])
def test_experts_are_stored_in_every_format_each_matrix_as_if_alone(format):
    format, value = format_named(format), torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    stored = format.quantize(value, torch.float32)
    assert stored.shape == format.stored_like(value.shape, torch.float32, "cpu").shape
    whole = format.dequantize(stored, value.shape, torch.float32)
    for number, matrix in enumerate(value):
        alone = format.dequantize(format.quantize(matrix, torch.float32), matrix.shape, torch.float32)
        assert torch.equal(whole[number], alone)


def gpt_oss():
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def qwen3_moe():
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        num_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.each_value_once
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("family", [mixtral, qwen3_moe, gpt_oss])
def test_every_implementation_of_experts_sees_the_update(family, implementation):
    torch.manual_seed(0)
    model, tokens = family(), batch(0, 2)
    with torch.no_grad():
        for parameter in model.parameters():  # some are not initialised
            parameter.copy_(0.1 * torch.randn_like(parameter))
    model.set_experts_implementation(implementation)
    names, kinds = [n for n, _ in model.named_parameters()], [type(m) for m in model.modules()]
    before = model(input_ids=tokens).logits
    wrap(model, EXPERTS)
    assert len(lowrank_layers(model)) == 4
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-5, atol=1e-6)
    for layer in lowrank_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    live = model(input_ids=tokens, labels=tokens)
    live.loss.backward()
    assert all(layer.lora_B.grad.any() and layer.lora_A.grad.any() for layer in lowrank_layers(model).values())
    assert not torch.allclose(live.logits, before, rtol=1e-2)
    merge_and_unwrap(model)
    assert sorted(n for n, _ in model.named_parameters()) == sorted(names)
    assert [type(m) for m in model.modules()] == kinds
    torch.testing.assert_close(model(input_ids=tokens).logits, live.logits, rtol=1e-4, atol=1e-5)


def test_a_wrapped_mixture_can_be_copied():
    model = wrap(mixtral(), EXPERTS)
    for layer in lowrank_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(input_ids=batch(0, 2)).logits, model(input_ids=batch(0, 2)).logits)
    nn.init.zeros_(lowrank_layers(other)["model.layers.0.mlp.experts.down_proj"].lora_B)
    assert not torch.equal(other(input_ids=batch(0, 2)).logits, model(input_ids=batch(0, 2)).logits)


def test_a_router_may_be_a_target_too():
    config = ReLoRAConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"])
    model = wrap(mixtral(), config)
    model(input_ids=batch(0, 2), labels=batch(0, 2)).loss.backward()
    layers = lowrank_layers(model)
    assert [layer.lora_A.shape for layer in layers.values()] == [(2, 24)] * 2
    assert all(layer.lora_B.grad.any() for layer in layers.values())


@pytest.mark.parametrize(
    "build, names, message",
    [
        (mixtral, ["experts.down_porj"], "'experts.down_porj' matches no parameter; the model's fused experts are "
         "experts.down_proj, experts.gate_up_proj"),
        (llama, ["gate_up_proj"], "matches no parameter; the model has no parameter of three dimensions"),
        (llama, ["q_proj.weight"], "is the weight of a linear; name the module in ReLoRAConfig.target_modules"),
        (gpt2, ["c_attn.bias"], "is the bias of a linear"),
        (llama, ["norm.weight"], r"has the shape \(20,\): it is no matrix"),
        (llama, ["embed_tokens.weight"], "is an embedding; train it whole, with ReLoRAConfig.trainable_modules"),
    ],
)  # fmt: skip
def test_parameters_that_cannot_be_targets_are_refused(build, names, message):
    with pytest.raises(ValueError, match=f"ReLoRAConfig.target_parameters: .*{message}"):
        wrap(build(), ReLoRAConfig(r=2, target_parameters=names))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lora_dropout=0.1), "relora.lora_dropout: 0.1 is not supported with relora.target_parameters"),
        (dict(restart_init="gradient"), "relora.restart_init: gradient is not supported with relora.target_parameters"),
        (dict(r=17), r"relora.r: 17 exceeds the smaller side of model.layers.0.mlp.experts.down_proj .*\(24x16\)"),
        (dict(frozen_dtype="nf4"), "frozen_dtype: .*nf4 stores blocks of 64 weights, which do not divide its 1x5x7"),
    ],
)
def test_options_that_do_not_fit_experts_are_refused(changes, message):
    config = ReLoRAConfig(**{**dict(r=2, target_modules=[], target_parameters=EXPERTS.target_parameters), **changes})
    model = mixtral()
    if "frozen_dtype" in changes:
        model.model.layers[0].mlp.experts.down_proj = nn.Parameter(torch.randn(1, 5, 7))
    assert any(re.search(message, text) for text in problems(model, config))


def test_experts_that_are_targets_are_not_called_frozen():
    (warning,) = warnings(mixtral(), EXPERTS)
    assert "experts" not in warning.partition("names them: ")[2]
    (warning,) = warnings(mixtral(), ReLoRAConfig(r=2))
    assert "experts.gate_up_proj" in warning and "relora.target_parameters (for fused experts)" in warning

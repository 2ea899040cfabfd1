"""Which linears are wrapped: those that are plain linear maps and are called; the others are named."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import AutoModelForCausalLM, FalconConfig, MambaConfig, MixtralConfig, Qwen2MoeConfig

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.wrap import (
    count_parameters,
    lowrank_layers,
    merge_and_unwrap,
    problems,
    target_linears,
    warnings,
    wrap,
)
from tests.small_models import batch, llama

CONFIG = ReLoRAConfig(r=2, lora_alpha=4, restart_every=10, restart_warmup_steps=2)


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x) if self.training else x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class Rewritten(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


def own_forward(*sizes):
    linear = nn.Linear(*sizes)
    linear.forward = lambda x: 3 * nn.functional.linear(x, linear.weight)
    return linear


def hooked(*sizes):
    linear = nn.Linear(*sizes)
    linear.register_forward_hook(lambda module, args, output: 3 * output)
    return linear


PECULIAR = {
    "scaled": Scaled,
    "noisy": Noisy,
    "no gradient": Clamped,
    "own forward": own_forward,
    "hook": hooked,
    "lazy": lambda rows, columns: nn.LazyLinear(columns),
    "weight norm": lambda *sizes: weight_norm(nn.Linear(*sizes)),
    "parametrized": lambda *sizes: parametrizations.weight_norm(nn.Linear(*sizes)),
    "pruned": lambda *sizes: prune.l1_unstructured(nn.Linear(*sizes), "weight", 0.5),
}


@pytest.mark.parametrize("kind", PECULIAR)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_linear_is_left_out_or_refused_by_name(kind, caplog):
    model = nn.Sequential(nn.Linear(8, 8), PECULIAR[kind](8, 8))
    refused = ReLoRAConfig(r=2, target_modules=["1"])
    assert [p for p in problems(model, refused) if "target_modules: 1 " in p and "relora.exclude_modules=[1]" in p]
    with pytest.raises(ValueError, match="ReLoRAConfig.target_modules: 1 "):
        wrap(model, refused)
    if kind == "lazy":
        model(torch.randn(2, 8))  # it becomes an nn.Linear
        assert list(target_linears(model, CONFIG)) == ["0", "1"]
        return
    x = torch.randn(3, 8)
    before = model.eval()(x)
    with caplog.at_level(logging.WARNING):
        wrap(model, CONFIG)
    assert list(lowrank_layers(model)) == ["0"] and "target_modules: 1 " in caplog.text
    assert "% of the parameters are frozen for good" in caplog.text
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_subclass_that_computes_what_a_linear_does_is_one(device, bias):
    with torch.device(device):
        model = nn.Sequential(Rewritten(8, 8, bias=bias))
    assert list(lowrank_layers(wrap(model, CONFIG))) == ["0"] and warnings(nn.Sequential(Rewritten(8, 8)), CONFIG) == []


class Twice(nn.Module):
    """One linear under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.other = nn.Linear(6, 6)

    def forward(self, x):
        return self.other(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("targets", ["all-linear", ["first"], ["second"]])
def test_a_module_with_two_names_is_replaced_at_both(targets):
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 6)
    before, (_, total) = model(x), count_parameters(model)
    wrap(model, ReLoRAConfig(r=2, target_modules=targets))
    assert model.first is model.second and isinstance(model.first, ReLoRALinear)
    assert count_parameters(model)[1] == total + (2 if targets == "all-linear" else 1) * 24
    torch.testing.assert_close(model(x), before)
    nn.init.normal_(model.first.lora_B)
    live = model(x)
    merge_and_unwrap(model)
    assert model.first is model.second and type(model.second) is nn.Linear
    torch.testing.assert_close(model(x), live)


def test_excluded_linears_are_left_out():
    excluding = ReLoRAConfig(r=4, exclude_modules=["down_proj", "layers.0.self_attn.q_proj", "mlp"])
    names = set(lowrank_layers(wrap(llama(), excluding)))
    everything = set(target_linears(llama(), CONFIG))
    assert everything - names == {
        "model.layers.0.self_attn.q_proj",
        *(f"model.layers.{i}.mlp.down_proj" for i in range(3)),
    }  # no parents, as in PEFT
    both = ReLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.self_attn.q_proj"])
    assert len(target_linears(llama(), both)) == 5
    assert len(target_linears(Twice(), ReLoRAConfig(exclude_modules=["second"]))) == 1


def test_excluded_names_agree_with_peft():
    peft = pytest.importorskip("peft")
    names = ["down_proj", "layers.0.self_attn.q_proj", "mlp", "proj"]
    plain = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=names))
    theirs = {
        name.removeprefix("base_model.model.") for name, module in plain.named_modules() if hasattr(module, "lora_A")
    }
    assert theirs == set(target_linears(llama(), ReLoRAConfig(exclude_modules=names)))


@pytest.mark.parametrize(
    "names, message",
    [
        (["dwon_proj"], "ReLoRAConfig.exclude_modules: 'dwon_proj' matches no module"),
        ("down_proj", "ReLoRAConfig.exclude_modules: the regular expression 'down_proj' matches no module; .* whole"),
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "leaves nothing"),
    ],
)
def test_wrong_exclusions_are_named(names, message):
    with pytest.raises(ValueError, match=message):
        wrap(llama(), ReLoRAConfig(r=4, exclude_modules=names))


@pytest.mark.parametrize(
    "pattern, unwanted",
    [
        (r".*\.(q|v)_proj", None),
        (r"model\.layers\.[01]\..*proj", r".*\.1\.mlp\..*"),
        (r".*down_proj|.*layers\.2.*gate_proj", ["layers.0.mlp.down_proj"]),
    ],
)
def test_a_regular_expression_means_what_it_means_to_peft(pattern, unwanted):
    peft = pytest.importorskip("peft")
    chosen = dict(r=2, target_modules=pattern, exclude_modules=unwanted)
    plain = peft.get_peft_model(llama(), peft.LoraConfig(**chosen))
    theirs = {
        name.removeprefix("base_model.model.") for name, module in plain.named_modules() if hasattr(module, "lora_A")
    }
    assert theirs == set(lowrank_layers(wrap(llama(), ReLoRAConfig(**chosen)))) != set()


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("q_proj", "the regular expression 'q_proj' matches no module; it is matched against whole names, such as "
         "model.layers.0.self_attn.q_proj, lm_head"),
        (r".*\.mlp", r"matches no linear; it is matched against whole names"),
    ],
)  # fmt: skip
def test_a_regular_expression_that_matches_nothing_is_refused_with_names(pattern, message):
    with pytest.raises(ValueError, match=f"ReLoRAConfig.target_modules: .*{message}"):
        wrap(llama(), ReLoRAConfig(r=2, target_modules=pattern))


def test_rslora_scales_by_the_root_of_the_rank():
    config = ReLoRAConfig(r=4, lora_alpha=8, use_rslora=True)
    layers = lowrank_layers(wrap(llama(), config))
    assert {layer.scaling for layer in layers.values()} == {config.scaling} == {8 / 4**0.5}


def test_an_exclusion_without_effect_is_warned_of():
    assert any("has no effect" in text for text in warnings(llama(), ReLoRAConfig(r=4, exclude_modules=["lm_head"])))


class Attention(nn.Module):
    """PyTorch's own layers, whose attention reads out_proj.weight; so does the whole layer in evaluation."""

    def __init__(self, norm_first=False):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)

    def forward(self, x):
        return self.block(x)


def test_attention_of_pytorch_keeps_its_output_projection():
    model, x = Attention(), torch.randn(2, 5, 16)
    wrap(model, CONFIG)
    assert list(lowrank_layers(model)) == ["block.linear1", "block.linear2"]
    for layer in lowrank_layers(model).values():
        nn.init.normal_(layer.lora_B)
    model(x).square().sum().backward()
    assert all(layer.lora_B.grad.any() for layer in lowrank_layers(model).values())
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)  # its fast path would read W alone
    with pytest.raises(ValueError, match="out_proj .*reads its weight"):
        wrap(Attention(), ReLoRAConfig(r=2, target_modules=["out_proj"]))


def test_a_mamba_keeps_the_projections_that_its_kernels_read():
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=67, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4, use_cache=False)
    )
    assert {name.rpartition(".")[2] for name in target_linears(model, CONFIG)} == {"in_proj"}
    text, frozen = warnings(model, CONFIG)
    assert all(name in text for name in ("x_proj", "dt_proj", "out_proj", "MambaMixer reads its weight"))
    assert "x_proj" in frozen


class ClampedWhileTraining(nn.Module):
    """As Gemma 3n's altup."""

    def __init__(self):
        super().__init__()
        self.coefficients, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        if self.training and x.shape[0]:
            return self.out(nn.functional.linear(x, self.coefficients.weight.clamp(-1, 1)))
        return self.out(self.coefficients(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_only_training_reads_is_left_out_in_either_mode(training):
    assert set(target_linears(ClampedWhileTraining().train(training), CONFIG)) == {"out"}


def test_a_falcon_is_wrapped_whole():
    model = AutoModelForCausalLM.from_config(
        FalconConfig(vocab_size=67, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, use_cache=False)
    )
    before = model.eval()(input_ids=batch(0, 2)).logits
    assert len(target_linears(model, CONFIG)) == 8
    torch.testing.assert_close(wrap(model, CONFIG)(input_ids=batch(0, 2)).logits, before, rtol=1e-5, atol=1e-6)


def mixtral():
    return AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=67,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            use_cache=False,
        )
    )


@pytest.mark.parametrize("trainable", [None, ["norms"], ["embeddings", "head", "norms"]])
def test_frozen_experts_are_warned_of_with_their_share(trainable, caplog):
    model = mixtral()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    with caplog.at_level(logging.WARNING):
        wrap(model, ReLoRAConfig(r=2, trainable_modules=trainable))
    assert "frozen for good" in caplog.text and "experts.gate_up_proj" in caplog.text
    if trainable is None or "head" in trainable:
        gates = 2 * 4 * 16
        assert f"{100 * (experts + gates) / total:.3g} %" in caplog.text
    assert not any(
        "frozen" in text
        for text in warnings(
            mixtral(), ReLoRAConfig(r=2, trainable_modules=["embeddings", "head", "norms", "experts", "gate"])
        )
    )


def test_a_rank_above_a_gate_names_the_option_that_leaves_the_gate_out():
    model = AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(
            vocab_size=67,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )
    found = problems(model, CONFIG)
    assert len(found) == 1 and "relora.exclude_modules=[shared_expert_gate]" in found[0]
    assert problems(model, ReLoRAConfig(r=2, exclude_modules=["shared_expert_gate"])) == []

"""Wrapping real model families: the function stays, what should train trains, mistakes are named."""

import dataclasses

import pytest
import torch
from torch import nn

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.formats import format_named
from relora_ds.lowrank.wrap import (
    count_parameters,
    lowrank_layers,
    merge_and_unwrap,
    parameter_groups,
    problems,
    warnings,
    wrap,
)
from tests.parity.cases import family_config
from tests.small_models import FAMILIES, batch, llama, qwen2

CONFIG = ReLoRAConfig(r=4, lora_alpha=8, restart_every=10, restart_warmup_steps=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapping_and_merging_keep_the_function(family):
    model, tokens = FAMILIES[family](), batch(0, 2)
    names = [n for n, _ in model.named_parameters()]
    before = model(input_ids=tokens).logits
    wrap(model, family_config(family))
    assert len(lowrank_layers(model)) == {"llama": 21, "gpt_neox": 12, "qwen2": 21, "gpt2": 12, "mixtral": 12}[family]
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-5, atol=1e-6)
    for layer in lowrank_layers(model).values():
        assert layer.lora_A.abs().sum() > 0 and layer.lora_B.abs().sum() == 0
        nn.init.normal_(layer.lora_B, std=0.1)
    updated = model(input_ids=tokens).logits
    assert not torch.allclose(updated, before, rtol=1e-2)
    merge_and_unwrap(model)
    assert [n for n, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(input_ids=tokens).logits, updated, rtol=1e-4, atol=1e-5)


def test_a_wrapped_model_is_not_saved_as_if_it_were_plain(tmp_path):
    """`from_pretrained` would drop A and B with a warning; a Trainer without our callback saves like this."""
    model = wrap(llama(), CONFIG)
    with pytest.raises(ValueError, match="save_merged"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    merge_and_unwrap(model).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_head_norms_and_biases_train_and_the_wrapped_weights_do_not(family):
    model = wrap(FAMILIES[family](), family_config(family))
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.weight" for name in lowrank_layers(model)}
    model(input_ids=batch(0, 2), labels=batch(0, 2)).loss.backward()
    trainable, total = count_parameters(model)
    assert total - trainable == sum(layer.weight.numel() for layer in lowrank_layers(model).values())


@pytest.mark.parametrize("format", ["bf16", "int8", "nf4_double"])
@pytest.mark.parametrize("as_buffer", [False, True])
def test_a_packed_weight_counts_as_the_weights_it_stands_for(format, as_buffer):
    model = wrap(llama(hidden_size=32, intermediate_size=48), CONFIG)
    plain, format = count_parameters(model), format_named(format)
    for layer in lowrank_layers(model).values():
        layer.store_weight(format.quantize(layer.weight.detach(), torch.float32), format, as_buffer=as_buffer)
    assert count_parameters(model) == plain


def test_gradient_reaches_B_at_once():  # a peer zeroes A as well, and nothing ever trains
    model = wrap(llama(), CONFIG)
    model(input_ids=batch(0, 2), labels=batch(0, 2)).loss.backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in lowrank_layers(model).values())


def test_trainable_modules_decides():
    def trains(model):
        return {n for n, p in model.named_parameters() if p.requires_grad}

    everything = trains(wrap(llama(), CONFIG))
    only_lora = trains(wrap(llama(), ReLoRAConfig(r=4, restart_every=None, trainable_modules=[])))
    assert only_lora == {n for n in everything if "lora_" in n}
    norms = trains(wrap(llama(), ReLoRAConfig(r=4, restart_every=None, trainable_modules=["norms"])))
    assert {n for n in norms if "lora_" not in n} == {n for n in everything if "norm" in n}
    parent = trains(wrap(llama(), ReLoRAConfig(r=4, restart_every=None, trainable_modules=["mlp"])))
    assert parent == only_lora, "naming a parent must not thaw the wrapped weights"


@pytest.mark.parametrize(
    "names, excluded", [(["mlp"], "gate_proj, up_proj, down_proj"), (["norms", "q_proj"], "q_proj")]
)
def test_a_module_that_is_to_train_whole_and_is_a_target_is_warned_of(names, excluded):
    """PEFT's modules_to_save would keep it from being one."""
    found = warnings(llama(), ReLoRAConfig(r=4, trainable_modules=names))[0]
    assert found.startswith(f"relora.trainable_modules: {names[-1]!r} has no effect")
    assert found.endswith(f"relora.exclude_modules=[{excluded}]")
    left_out = ReLoRAConfig(r=4, trainable_modules=names, exclude_modules=excluded.split(", "))
    assert not any("has no effect" in message for message in warnings(llama(), left_out))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"product": "folded", "lora_dropout": 0.1}, "folded has no effect with relora.lora_dropout 0.1"),
        ({"product": "auto", "lora_dropout": 0.1}, None),
        ({"product": "folded"}, None),
    ],
)
def test_a_product_that_no_layer_makes_is_warned_of(options, words):
    found = [text for text in warnings(llama(), ReLoRAConfig(r=4, **options)) if "relora.product" in text]
    assert len(found) == (words is not None) and all(words in text for text in found)


def test_layers_multiply_as_the_config_says():
    model = wrap(llama(), ReLoRAConfig(r=4, product="folded"))
    assert all(layer.folds(1) for layer in lowrank_layers(model).values())


def test_target_modules_by_suffix():
    model = wrap(llama(), ReLoRAConfig(r=4, restart_every=None, target_modules=["q_proj", "layers.1.mlp.up_proj"]))
    assert [n.removeprefix("model.") for n in lowrank_layers(model)] == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
        "layers.2.self_attn.q_proj",
    ]


def test_tied_embeddings_stay_tied():
    model = wrap(qwen2(), CONFIG)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_lora_without_base_has_no_weight_and_both_factors_random():
    model = wrap(llama(), dataclasses.replace(CONFIG, frozen_dtype="nf4"), base=False)  # which could not store W
    for name, layer in lowrank_layers(model).items():
        assert layer.weight is None and layer.lora_A.std() > 0 and layer.lora_B.std() > 0, name
    plain = merge_and_unwrap(model)
    assert plain.model.layers[0].mlp.up_proj.weight.std() > 0


def test_groups_have_no_decay_on_vectors_and_lora_of_its_own():
    groups = {g["name"]: g for g in parameter_groups(wrap(FAMILIES["gpt_neox"](), CONFIG), weight_decay=0.1)}
    decays = {"lora": 0.1, "lora_A": 0.0, "matrices": 0.1, "vectors": 0.0}
    assert {n: g["weight_decay"] for n, g in groups.items()} == decays
    assert all(p.ndim == 1 for p in groups["vectors"]["params"])
    assert len(groups["lora"]["params"]) == len(groups["lora_A"]["params"]) == 12
    assert [g["name"] for g in parameter_groups(llama(), weight_decay=0.1)] == ["matrices", "vectors"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(r=21), "ReLoRAConfig.r: 21 exceeds the smaller side of model.layers.0.self_attn.q_proj"),
        (dict(target_modules=["q_porj"]), "ReLoRAConfig.target_modules: 'q_porj' matches no module"),
        (dict(target_modules=["mlp"]), "ReLoRAConfig.target_modules: 'mlp' matches no linear"),
        (dict(trainable_modules=["emb"]), "ReLoRAConfig.trainable_modules: 'emb' matches no module"),
        (
            dict(frozen_dtype="nf4"),
            "ReLoRAConfig.frozen_dtype: model.layers.0.self_attn.q_proj and 11 more: nf4 stores blocks",
        ),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        wrap(llama(), ReLoRAConfig(**{**dict(r=4, restart_every=None), **changes}))


def test_all_mistakes_come_at_once():
    found = problems(llama(), ReLoRAConfig(r=99, restart_every=None, trainable_modules=["nothing"]))
    assert any("relora.r: 99" in p for p in found) and any("'nothing'" in p for p in found)


def test_wrapping_twice_is_an_error():
    with pytest.raises(ValueError, match="wrapped already"):
        wrap(wrap(llama(), CONFIG), CONFIG)


def test_a_weight_shared_between_modules_is_an_error():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        ValueError,
        match=r"up_proj \(and 1 like it\) is shared with another module .*"
        r"ReLoRAConfig.exclude_modules=\[up_proj\]",
    ):
        wrap(model, CONFIG)

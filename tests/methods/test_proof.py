"""A small copy of a model is run before training: what does not predict the next token or would not train is named."""

import dataclasses
import json
import time

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    BartConfig,
    BertConfig,
    BloomConfig,
    DeepseekV32Config,
    FalconConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    T5Config,
    TrOCRConfig,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from relora_ds.config import RecipeError, ReLoRAConfig
from relora_ds.methods import proof, small_copy
from relora_ds.methods.proof import prove
from relora_ds.training.preflight import resolve

CONFIG = ReLoRAConfig(r=4, lora_alpha=8, restart_every=10, restart_warmup_steps=2)


@pytest.mark.parametrize(
    "config, attention",
    [
        (LlamaConfig(), "sdpa"),
        (Qwen2Config(tie_word_embeddings=True), "sdpa"),
        pytest.param(FalconConfig(), "sdpa", marks=pytest.mark.slow),
        (MambaConfig(), "eager"),
        (MixtralConfig(), "sdpa"),
        pytest.param(GPT2Config(), "sdpa", marks=pytest.mark.slow),
        (OPTConfig(layerdrop=0.2), "sdpa"),
        pytest.param(BertConfig(is_decoder=True), "sdpa", marks=pytest.mark.slow),
        (BloomConfig(), "eager"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_trains_is_not_refused(config, attention):
    state = torch.get_rng_state()
    assert prove(config, CONFIG, attention=attention) == proof.Proof()
    assert prove(config, None, attention=attention) == proof.Proof()
    assert torch.equal(torch.get_rng_state(), state)


OWNED = ReLoRAConfig(trains="none")
EXPERTS = dataclasses.replace(CONFIG, target_parameters=["experts.gate_up_proj", "experts.down_proj"])


@pytest.mark.each_value_once
@pytest.mark.parametrize("frozen", ["auto", "int8", "nf4", "fp8"])
@pytest.mark.parametrize(
    "config, relora",
    [
        (GPT2Config(), CONFIG),
        (MixtralConfig(), EXPERTS),
        (GptOssConfig(), dataclasses.replace(EXPERTS, target_modules=[])),
    ],
    ids=["Conv1D", "experts", "transposed experts"],
)
def test_other_layouts_are_tried(config, relora, frozen):
    relora, attention = dataclasses.replace(relora, frozen_dtype=frozen), "eager"
    assert prove(config, relora, attention=attention) == proof.Proof()


def test_experts_whose_update_is_lost_are_named(monkeypatch):
    """Code that reads the frozen weight past the attribute."""
    forward = MixtralExperts.forward

    def patched(self, *inputs):
        if made := self.__dict__.get("_updated_parameters"):
            self.__dict__["_updated_parameters"] = {name: value.detach() for name, value in made.items()}
        return forward(self, *inputs)

    monkeypatch.setattr(MixtralExperts, "forward", patched)
    (problem,) = prove(MixtralConfig(), dataclasses.replace(EXPERTS, target_modules=[])).problems
    assert problem.startswith("relora.target_parameters: model.layers.0.mlp.experts.gate_up_proj (and ")
    assert "no gradient reaches" in problem and problem.endswith("leave it out of relora.target_parameters")


@pytest.mark.parametrize("frozen", ["int8", "nf4", "fp8"])
def test_stored_weights_are_tried_as_they_are_stored(frozen, monkeypatch):
    relora = dataclasses.replace(CONFIG, frozen_dtype=frozen)
    assert prove(LlamaConfig(), relora) == proof.Proof()
    monkeypatch.setattr(LlamaForCausalLM, "forward", _reading_the_dtype(LlamaForCausalLM.forward))
    (problem,) = prove(LlamaConfig(), relora).problems
    assert problem.startswith("relora.target_modules: ") and f"frozen_dtype {frozen}" in problem


def _reading_the_dtype(forward):
    """As T5 does: activations are cast to the dtype of a weight."""

    def patched(self, **inputs):
        dtype = self.model.layers[0].mlp.down_proj.weight.dtype
        output = forward(self, **inputs)
        output.logits = output.logits.to(dtype).float()
        return output

    return patched


@pytest.mark.parametrize(
    "config, what",
    [
        (BartConfig(), "do not shift the labels"),
        (TrOCRConfig(), "do not shift the labels"),
        (BertConfig(), "let a token see those after it"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
@pytest.mark.parametrize("relora", [None, CONFIG], ids=["full rank", "low rank"])
def test_what_does_not_predict_the_next_token_is_refused(config, what, relora):
    (problem,) = prove(config, relora).problems
    assert problem.startswith("model.name_or_path: transformers' ") and what in problem and "choose" in problem


def test_what_gets_no_gradient_is_named_with_what_leaves_it_out():
    (problem,) = prove(DeepseekV32Config(), CONFIG).problems
    assert "relora.exclude_modules=[wq_b, wk, weights_proj]" in problem and "indexer.wk (and 60 like it)" in problem
    left_out = dataclasses.replace(CONFIG, exclude_modules=["wq_b", "wk", "weights_proj"])
    assert prove(DeepseekV32Config(), left_out) == proof.Proof()


class Gate(nn.Module):
    """Reads the weight of its linear in a way that its source code does not show."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        weight = getattr(self.inner, "wei" + "ght")
        if self.how == "read":
            return nn.functional.linear(x, weight)
        if self.how == "read and called":
            return self.inner(x) + nn.functional.linear(x, weight)
        if self.how == "fails":
            return self.inner(x) + self.inner.out_features + (0 if isinstance(self.inner, nn.Linear) else 1 / 0)
        return self.inner(x) + (0 if isinstance(self.inner, nn.Linear) else 1)


@pytest.mark.parametrize(
    "how, reason",
    [
        ("read", "no gradient reaches"),
        ("read and called", "another function when it is merged"),
        ("fails", "fails when it is wrapped"),
        ("looks", "changes the model's function"),
    ],
)
def test_linears_that_wrapping_would_break_are_named(how, reason, monkeypatch):
    init = LlamaForCausalLM.__init__

    def patched(self, config):
        init(self, config)
        for layer in self.model.layers:
            layer.mlp.up_proj = Gate(layer.mlp.up_proj, how)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", patched)
    config = LlamaConfig(num_hidden_layers=7)
    (problem,) = prove(config, CONFIG).problems
    assert problem.startswith("relora.target_modules: model.layers.0.mlp.up_proj.inner (and 6 like it) ")
    assert reason in problem and problem.endswith("leave it out with relora.exclude_modules=[inner]")
    assert prove(config, dataclasses.replace(CONFIG, exclude_modules=["inner"])).problems == []


@pytest.mark.parametrize(
    "how, reason", [("read", "no gradient reaches"), ("read and called", "a part of its gradient")]
)
def test_weights_whose_owners_would_get_no_gradient_or_a_part_are_named(how, reason, monkeypatch):
    init = LlamaForCausalLM.__init__

    def patched(self, config):
        init(self, config)
        self.model.layers[0].mlp.up_proj = Gate(self.model.layers[0].mlp.up_proj, how)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", patched)
    (problem,) = prove(LlamaConfig(num_hidden_layers=1), OWNED).problems
    assert problem.startswith("relora.target_modules: model.layers.0.mlp.up_proj.inner would ") and reason in problem


@pytest.mark.parametrize(
    "config, relora",
    [
        (LlamaConfig(), OWNED),
        (LlamaConfig(), dataclasses.replace(OWNED, target_modules="all-matrices")),
        (Qwen2Config(tie_word_embeddings=True), OWNED),
        (GPT2Config(), OWNED),
        (MixtralConfig(), dataclasses.replace(OWNED, target_parameters=EXPERTS.target_parameters)),
        (GptOssConfig(), dataclasses.replace(OWNED, target_parameters=EXPERTS.target_parameters, target_modules=[])),
    ],
    ids=["linears", "all matrices", "tied", "Conv1D", "experts", "transposed experts"],
)
def test_owners_get_the_gradient_that_autograd_has(config, relora):
    assert prove(config, relora, attention="eager") == proof.Proof()


def test_a_fault_is_named_though_not_every_target_could_be_tried(monkeypatch):
    init, possible = LlamaForCausalLM.__init__, proof._possible_targets

    def patched(self, config):
        init(self, config)
        for layer in self.model.layers:
            layer.mlp.up_proj = Gate(layer.mlp.up_proj, "looks")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", patched)
    monkeypatch.setattr(proof, "_possible_targets", lambda model: [n for n in possible(model) if "down_proj" not in n])
    found = prove(LlamaConfig(num_hidden_layers=7), CONFIG)
    assert len(found.problems) == 1 and "up_proj.inner (and 6 like it) changes the model's" in found.problems[0]
    assert found.warnings == ["relora.target_modules: model.layers.mlp.down_proj could not be tried on a small copy"]


def test_a_rare_expert_is_not_refused():
    config = Qwen2MoeConfig(num_experts=8, num_experts_per_tok=1)
    assert prove(config, dataclasses.replace(CONFIG, exclude_modules=["shared_expert_gate"])).problems == []


def test_what_cannot_be_tried_is_refused_or_said(monkeypatch):
    class OwnConfig(LlamaConfig):
        """A model whose code is not transformers'."""

    monkeypatch.setattr(
        small_copy, "tiny_config", lambda config: (_ for _ in ()).throw(ValueError("no copy of this one"))
    )
    (problem,) = prove(LlamaConfig(), CONFIG).problems
    assert "llama models of this configuration cannot be run on text alone (ValueError: no copy of this one)" in problem
    assert prove(OwnConfig(), CONFIG).problems == []
    (warning,) = prove(OwnConfig(), CONFIG).warnings
    assert "no copy of this one" in warning


@pytest.mark.parametrize("family", ["gemma4_text", pytest.param("gemma3n_text", marks=pytest.mark.slow)])
def test_a_family_that_amplifies_rounding_is_not_refused(family):
    assert prove(CONFIG_MAPPING[family](), CONFIG).problems == []


def test_targets_of_single_layers_are_tried_by_their_kind():
    deep = LlamaConfig(num_hidden_layers=30)
    assert prove(deep, dataclasses.replace(CONFIG, target_modules=["layers.29.mlp.up_proj"])) == proof.Proof()


@pytest.mark.parametrize("method", ["full", "control", "lora", "relora"])
def test_the_recipe_is_refused_whatever_its_method(method, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            BartConfig(
                d_model=64,
                decoder_layers=2,
                encoder_layers=2,
                decoder_ffn_dim=64,
                encoder_ffn_dim=64,
                decoder_attention_heads=2,
                encoder_attention_heads=2,
            ).to_dict()
        )
    )
    with pytest.raises(RecipeError, match="do not shift the labels|control"):
        resolve(
            "tiny",
            [
                f"method={method}",
                "model.preset=null",
                f"model.name_or_path={tmp_path}",
                f"run_dir={tmp_path / 'run'}",
                "warm_start_steps=0",
            ],
        )


def test_attention_that_a_family_lacks_is_named_with_the_one_that_it_has():
    (problem,) = prove(MambaConfig(), CONFIG).problems
    assert problem.startswith("model.attn_implementation: sdpa ") and "attn_implementation=eager" in problem


def test_an_encoder_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(T5Config().to_dict()))
    with pytest.raises(RecipeError, match="model.name_or_path: .* is a t5 model, an encoder-decoder"):
        resolve("tiny", ["model.preset=null", f"model.name_or_path={tmp_path}", f"run_dir={tmp_path / 'run'}"])


def test_the_shipped_presets_take_well_under_two_seconds():
    prove(LlamaConfig(), CONFIG)  # the imports
    started = time.process_time()
    resolve("tiny", [], to_run=False)
    prove(LlamaConfig(num_hidden_layers=24, hidden_size=2048, intermediate_size=5461, num_attention_heads=32), CONFIG)
    assert time.process_time() - started < 6  # well under 2 on an idle machine

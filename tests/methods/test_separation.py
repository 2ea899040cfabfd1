"""Document masks are refused where a small copy of the model does not keep documents apart, for whatever reason."""

import pytest
import torch
from transformers import (
    BloomConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    StableLmConfig,
)

from relora_ds.config import RecipeError
from relora_ds.methods import proof
from relora_ds.methods.proof import prove
from relora_ds.training.preflight import resolve

FLASH = "flash_attention_2"


@pytest.mark.each_value_once
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", FLASH])
@pytest.mark.parametrize(
    "config", [LlamaConfig(), GPT2Config(), MistralConfig(), MixtralConfig()], ids=lambda c: c.model_type
)
def test_what_keeps_documents_apart_is_not_refused(config, attention):
    state = torch.get_rng_state()
    assert prove(config, None, attention=attention, documents=True) == proof.Proof()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (BloomConfig(), "eager"),  # positions are in the attention's bias
        pytest.param(MambaConfig(), "eager", marks=pytest.mark.slow),  # a state goes from token to token
        pytest.param(Lfm2Config(layer_types=["conv", "full_attention"] * 16), "sdpa", marks=pytest.mark.slow),
        pytest.param(OPTConfig(), "sdpa", marks=pytest.mark.slow),  # its mask is made without the positions
        (StableLmConfig(), FLASH),  # its layers drop the bounds of documents
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_what_does_not_keep_them_apart_is_refused(config, attention):
    assert prove(config, None, attention=attention) == proof.Proof()
    (problem,) = prove(config, None, attention=attention, documents=True).problems
    assert problem.startswith(f"data.packing: masked does not fit transformers' {config.model_type} models")
    assert "see another one" in problem and problem.endswith("data.packing=true or data.packing=false")
    assert ("use another model.attn_implementation" in problem) == (attention == FLASH)


def patched(monkeypatch, change) -> str:
    """The problem of LLaMAs whose forward is another one."""
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, **inputs: change(forward, self, inputs))
    (problem,) = prove(LlamaConfig(), None, documents=True).problems
    return problem


def test_a_forward_without_positions_is_refused(monkeypatch):
    def change(forward, model, inputs):
        if "position_ids" in inputs:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
        return forward(model, **inputs)

    assert "which cannot be told where documents begin (TypeError: forward() got" in patched(monkeypatch, change)


def test_a_mean_over_other_tokens_is_refused(monkeypatch):
    def change(forward, model, inputs):
        return forward(model, **{name: value for name, value in inputs.items() if name != "num_items_in_batch"})

    assert "do not divide the loss by the number of tokens" in patched(monkeypatch, change)


def test_a_recipe_with_such_a_model_is_refused_before_anything_is_built(tmp_path):
    BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=300).to_json_file(tmp_path / "bloom.json")
    overrides = [
        *("model.preset=null", f"model.name_or_path={tmp_path / 'bloom.json'}", "model.attn_implementation=eager"),
        f"run_dir={tmp_path / 'run'}",
    ]
    resolve("tiny", overrides)
    resolve("tiny", [*overrides, "data.packing=false"])
    with pytest.raises(RecipeError, match="data.packing: masked does not fit transformers' bloom models, which"):
        resolve("tiny", [*overrides, "data.packing=masked"])
    assert not (tmp_path / "run").exists()

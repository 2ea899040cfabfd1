"""Embeddings and head that are tied or not, where the configuration says otherwise: every way out is the live model."""

import json
import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import relora_ds
from relora_ds.config import ModelConfig, ReLoRAConfig
from relora_ds.interop import peft
from relora_ds.interop.hf_export import export
from relora_ds.interop.sources import config_of, weights_of
from relora_ds.lowrank.wrap import merge_and_unwrap, wrap
from relora_ds.models.build import build_config, build_model, meta_model, model_without_values
from relora_ds.models.without_values import fill
from relora_ds.zero.plain_model import load_plain
from relora_ds.zero.teardown import release
from tests.ranks import ranks
from tests.small_models import VOCAB, batch, llama, qwen2

CONFIG = ReLoRAConfig(r=4, lora_alpha=8, restart_every=2, restart_warmup_steps=1)
KINDS = ("tied", "untied", "flag says tied", "flag says untied")


def model_of(kind: str):
    model = qwen2(tie_word_embeddings=kind in ("tied", "flag says tied", "flag says untied"))
    if kind == "flag says tied":
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    if kind == "flag says untied":
        model.config.tie_word_embeddings = False
    return model


def loss_of(directory) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(input_ids=batch(9, 4), labels=batch(9, 4)).loss.item()


def trained(kind: str, directory: str, stage: int) -> float:
    engine, *_ = relora_ds.initialize(
        wrap(model_of(kind), CONFIG), f"zero{stage}", CONFIG, lr=1e-2, total_steps=5, precision="fp32"
    )
    for step in range(5):
        engine.backward(engine(input_ids=batch(step, 4), labels=batch(step, 4)).loss)
        engine.step()
    engine.save_checkpoint(f"{directory}/checkpoints", tag="last")
    engine.save_merged(f"{directory}/merged")
    engine.eval()
    with torch.no_grad():
        loss = engine(input_ids=batch(9, 4), labels=batch(9, 4)).loss.item()
    release(engine)
    return loss


@pytest.mark.each_value_once
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_export_is_the_live_model(kind, stage, tmp_path):
    (live,) = ranks(1).run(trained, kind, str(tmp_path), stage)
    export(tmp_path / "checkpoints" / "last", tmp_path / "hf")
    export(tmp_path / "checkpoints" / "last", tmp_path / "peft", format="peft")
    for directory in ("merged", "hf"):
        assert loss_of(tmp_path / directory) == pytest.approx(live, rel=2e-5), directory
        is_tied = json.loads((tmp_path / directory / "config.json").read_text())["tie_word_embeddings"]
        assert is_tied == (kind in ("tied", "flag says untied"))
    with torch.no_grad():
        loaded = peft.load(tmp_path / "peft").eval()(input_ids=batch(9, 4), labels=batch(9, 4)).loss.item()
    assert loaded == pytest.approx(live, rel=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_merged_in_one_process_is_saved_as_it_is(kind, tmp_path, caplog):
    model = model_of(kind)
    with caplog.at_level(logging.WARNING):
        wrap(model, CONFIG)
    assert ("config.tie_word_embeddings" in caplog.text) == kind.startswith("flag")
    merge_and_unwrap(model.eval()).save_pretrained(tmp_path)
    with torch.no_grad():
        live = model(input_ids=batch(9, 4), labels=batch(9, 4)).loss.item()
    assert loss_of(tmp_path) == pytest.approx(live, rel=1e-6)


class NeverTied(LlamaForCausalLM):
    _tied_weights_keys = {}


def test_what_cannot_be_saved_is_refused_before_training():
    model = NeverTied(llama().config)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="share a weight, and NeverTied cannot be saved"):
        wrap(model, CONFIG)
    assert model.config.tie_word_embeddings is False


def stored(tmp_path, kind: str):
    """A model directory as it is found elsewhere, flag and weights at odds."""
    model = model_of("tied" if kind == "flag says untied" else "untied" if kind == "flag says tied" else kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = kind in ("tied", "flag says tied")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("kind", ["tied", "untied", "flag says tied"])
def test_pretrained_weights_decide(kind, tmp_path):
    model = stored(tmp_path, kind)
    recipe = ModelConfig(name_or_path=str(tmp_path), init="pretrained", attn_implementation="eager")
    config = build_config(recipe, VOCAB, 16)
    assert config.tie_word_embeddings == config_of(str(tmp_path)).tie_word_embeddings == (kind == "tied")
    built = build_model(config, recipe, 0)
    torch.testing.assert_close(built(input_ids=batch(0, 2)).logits, model(input_ids=batch(0, 2)).logits)
    assert {name for name, _ in meta_model(config).named_parameters()} == {n for n, _ in built.named_parameters()}
    plain = fill(model_without_values(config), weights_of(str(tmp_path)))
    torch.testing.assert_close(plain(input_ids=batch(0, 2)).logits, model(input_ids=batch(0, 2)).logits)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    stored(tmp_path, "flag says untied")
    recipe = ModelConfig(name_or_path=str(tmp_path), init="pretrained")
    with pytest.raises(ValueError, match=r"missing \(first: lm_head.weight\).*tie_word_embeddings"):
        build_model(build_config(recipe, VOCAB, 16), recipe, 0)


def test_two_heads_are_not_loaded_into_one():
    with pytest.raises(ValueError, match="embed_tokens.weight.* differ, but share one tensor|lm_head.weight.* differ"):
        load_plain(model_of("tied"), dict(model_of("untied").named_parameters()))

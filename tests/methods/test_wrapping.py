"""`relora_ds.wrap` tries a small copy of a transformers model before it changes the model."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, DeepseekV32Config, LlamaForSequenceClassification

import relora_ds
from relora_ds import ReLoRAConfig
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.models.tiny import tiny_config
from tests.small_models import llama

CONFIG = ReLoRAConfig(r=4, lora_alpha=8)


def test_linears_that_would_not_train_are_refused_and_the_model_is_left_alone():
    model = AutoModelForCausalLM.from_config(tiny_config(DeepseekV32Config()))
    with pytest.raises(ValueError, match=r"no gradient reaches .*exclude_modules=\[wq_b, wk, weights_proj\]"):
        relora_ds.wrap(model, CONFIG)
    assert not lowrank_layers(model) and all(parameter.requires_grad for parameter in model.parameters())
    relora_ds.wrap(model, dataclasses.replace(CONFIG, exclude_modules=["wq_b", "wk", "weights_proj"]))
    assert lowrank_layers(model)


def test_a_loss_of_the_callers_own_is_no_problem():
    model = AutoModelForCausalLM.from_config(tiny_config(BartConfig()))
    with pytest.raises(ValueError, match="encoder_attn"):  # a decoder alone has nothing to attend to
        relora_ds.wrap(model, CONFIG)
    relora_ds.wrap(model, dataclasses.replace(CONFIG, target_modules=["self_attn.q_proj", "fc1", "fc2"]))
    assert lowrank_layers(model)


def test_a_model_that_is_no_language_model_is_wrapped_as_it_is():
    model = LlamaForSequenceClassification(llama().config)
    model.config.pad_token_id = 0
    relora_ds.wrap(model, dataclasses.replace(CONFIG, exclude_modules=["score"]))
    output = model(input_ids=torch.ones(2, 8, dtype=torch.long), labels=torch.zeros(2, dtype=torch.long))
    output.loss.backward()
    assert all(layer.lora_B.grad is not None for layer in lowrank_layers(model).values())

"""A wrapped model carries its config, as PEFT's models do, and everything else that it could do before."""

import copy
import io

import pytest
import torch
from torch import nn

import relora_ds
from relora_ds import ReLoRAConfig
from relora_ds.lowrank.wrap import count_parameters, lowrank_layers
from tests.small_models import batch, llama, mixtral


def config(**changes) -> ReLoRAConfig:
    return ReLoRAConfig(**{**dict(r=4, lora_alpha=8, restart_every=4, restart_warmup_steps=2), **changes})


def test_the_config_is_the_models_own():
    given = config()
    model = relora_ds.wrap(llama(), given)
    assert model.relora_config == given
    given.restart_every = 5
    assert model.relora_config == config()


def test_the_trainable_parameters_are_printed_in_pefts_words(capsys):
    from peft import LoraConfig, get_peft_model

    model = relora_ds.wrap(llama(), config(trainable_modules=[], target_modules=["q_proj", "v_proj"]))
    capsys.readouterr()  # what wrapping warns of, where another test has shown warnings
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).print_trainable_parameters()
    assert ours == capsys.readouterr().out
    assert f"trainable params: {count_parameters(model)[0]:,} || " in ours


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("family", [llama, mixtral])
def test_a_copy_carries_it_too_and_speaks_for_itself(family, copied, capsys):
    experts = ["experts.gate_up_proj", "experts.down_proj"] if family is mixtral else None
    model = relora_ds.wrap(family(), config(target_parameters=experts))
    other = copied(model)
    assert other.relora_config == model.relora_config and other.relora_config is not model.relora_config
    other.lm_head.weight.requires_grad_(False)
    other.print_trainable_parameters()
    model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first != second
    assert f"{count_parameters(model)[0]:,}" in second
    tokens = batch(0, 2)
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_weights_are_all_that_a_state_dict_has():
    model = relora_ds.wrap(llama(), config())
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in model.state_dict() if "relora" in name or "print" in name} == set()
    assert names <= set(model.state_dict())
    other = relora_ds.wrap(llama(seed=1), config())
    other.load_state_dict(model.state_dict())
    assert "relora_config" not in model.config.to_dict()


def test_a_merged_model_is_plain_again(tmp_path):
    model = relora_ds.merge_and_unwrap(relora_ds.wrap(llama(), config()))
    assert not hasattr(model, "relora_config") and not hasattr(model, "print_trainable_parameters")
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.model_type == "llama"


def test_any_module_carries_it():
    model = relora_ds.wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), config())
    assert lowrank_layers(model) and model.relora_config == config()


def test_a_mistake_has_the_name_that_its_caller_wrote(caplog):
    with pytest.raises(ValueError) as raised:
        relora_ds.wrap(llama(), config(r=99, trainable_modules=["nothing"]))
    messages = str(raised.value).splitlines()
    assert len(messages) >= 2 and all(message.startswith("ReLoRAConfig.") for message in messages)
    assert "relora." not in str(raised.value).replace("ReLoRAConfig.", "")
    relora_ds.wrap(llama(), config(trainable_modules=[]))
    assert "ReLoRAConfig.trainable_modules" in caplog.text and "relora.t" not in caplog.text

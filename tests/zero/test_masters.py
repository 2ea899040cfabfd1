"""The masters start from the model's fp32 values, not from what DeepSpeed's cast to bf16 left of them."""

import pytest
import torch

import relora_ds
from relora_ds.lowrank.wrap import lowrank_layers
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import llama


def compare_with_the_model(stage, offload) -> None:
    model = relora_ds.wrap(llama(), cases.relora_config(), seed=0)
    engine = cases.build(stage, precision="bf16", offload=offload)
    masters, copies = cases.gathered_state(engine)["master"], cases.forward_copies(engine)
    truncated = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(masters[name], parameter), f"{name}: the master is not the model's fp32 value"
            assert torch.equal(copies[name], parameter.to(torch.bfloat16)), f"{name}: forward reads something else"
            truncated += not torch.equal(parameter, parameter.to(torch.bfloat16).float())
    assert truncated > 10, "bf16 holds these values exactly: the test would show nothing"
    stored = cases.stored_weights(engine)
    for name, layer in lowrank_layers(model).items():
        assert torch.equal(stored[name], layer.weight.to(torch.bfloat16))
    for name in engine.frozen.owned():
        assert torch.equal(engine.frozen.masters[name], model.get_submodule(name).weight), f"{name}: frozen master"
    cases.release(engine)


@pytest.mark.parametrize("stage, offload", [(0, False), (1, False), (2, False), (3, False), (1, True), (3, True)])
def test_masters_are_the_models_fp32_values(stage, offload):
    ranks(2).run(compare_with_the_model, stage, offload)

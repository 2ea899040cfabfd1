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


def in_another_dtype(model, kind: str):
    """What `from_pretrained` gives for a checkpoint in 16 bit, with norms in fp32 or without, and a model in fp64."""
    model.to({"fp64": torch.float64, "fp16": torch.float16}.get(kind, torch.bfloat16))
    model.register_buffer("extra", torch.full((3,), 0.1, dtype=model.dtype), persistent=False)
    if kind == "mixed":
        for name, module in model.named_modules():
            if "norm" in name:
                module.float()
    return model


def trained(stage: int, precision: str, kind: str, by_hand: bool) -> dict[str, torch.Tensor]:
    """Masters, moments and the merged model after some small steps and a restart.

    by_hand: convert the model to fp32 before it is given to `initialize`.
    """
    relora = cases.relora_config(restart_every=3, restart_warmup_steps=1)
    model = in_another_dtype(relora_ds.wrap(llama(), relora), kind)
    if by_hand:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.to(torch.float32)
    engine, *_ = relora_ds.initialize(
        model,
        cases.ds_settings(stage, precision),
        relora,
        lr=3e-4,
        total_steps=6,
        precision=precision,
        min_lr_ratio=1.0,
        micro_batch_size=cases.GLOBAL_BATCH // 2,
    )
    for step in range(5):
        cases.train_step(engine, step)
    assert engine.restarts == [3]
    assert all(buffer.dtype != torch.float64 for buffer in engine.module.buffers())
    found = {"extra": engine.module.extra.clone()}
    for shard in engine.shards:
        for what in ("master", "exp_avg", "exp_avg_sq"):
            value = shard.read(what)
            assert value.dtype == torch.float32, f"{what} of {shard.name}"
            found[f"{what} of {shard.name}"] = value.clone()
    found |= engine.collect_merged()
    cases.release(engine)
    return found


@pytest.mark.parametrize(
    "stage, precision, kind",
    [
        pytest.param(0, "fp32", "bf16", marks=pytest.mark.slow),
        pytest.param(0, "fp32", "mixed", marks=pytest.mark.slow),
        (0, "fp32", "fp64"),
        pytest.param(1, "fp32", "fp16", marks=pytest.mark.slow),
        (3, "fp32", "mixed"),
        pytest.param(0, "bf16", "bf16", marks=pytest.mark.slow),
        (2, "bf16", "mixed"),
    ],
)
def test_a_model_in_another_dtype_trains_as_its_values_in_fp32(stage, precision, kind):
    for found, wanted in zip(
        ranks(2).run(trained, stage, precision, kind, False),
        ranks(2).run(trained, stage, precision, kind, True),
        strict=True,
    ):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name

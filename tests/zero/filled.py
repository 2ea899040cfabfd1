"""Engines that are filled from a source of weights, and what must be in them."""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters

import relora_ds
from relora_ds.lowrank.wrap import lowrank_layers, wrap_quietly
from relora_ds.zero import fill, shards
from relora_ds.zero.collect import collect_owned
from relora_ds.zero.plain_model import persistent_buffers
from relora_ds.zero.weights import OwnedWeights, plain_tensors, readers_of
from tests.parity import cases
from tests.small_models import FAMILIES
from tests.zero.live_tensors import live_bytes


class Weights:
    """A source of the values of `model`; every rank can read all, unless `owners` says otherwise."""

    def __init__(self, model, owners=None):
        self.values = {tensor.name: _value(model, tensor.name) for tensor in plain_tensors(model)}
        self.shapes = {name: value.shape for name, value in self.values.items()}
        self.owners, self.num_read, self.peak = owners, 0, 0

    def read(self, name):
        self.num_read += 1
        return self.values[name].clone()


def _value(model, name: str) -> torch.Tensor:
    return {**dict(model.named_parameters()), **persistent_buffers(model)}[name].detach().clone()


def without_values(model):
    """The model with its parameters on the meta device, tied as they were."""
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
    return model


def engine_of(model, relora, stage, precision, offload=None, **how):
    """offload: "optimizer" or "parameters" (and the optimizer)."""
    zero = {} if offload != "parameters" else {"offload_param": {"device": "cpu"}}
    return relora_ds.initialize(
        model,
        cases.ds_settings(stage, precision, offload is not None, **zero),
        relora,
        lr=1e-2,
        total_steps=10,
        precision=precision,
        micro_batch_size=2,
        **how,
    )[0]


def assert_has_the_values_of(engine, model, precision: str) -> None:
    """model: wrapped likewise, with values."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    masters, copies = cases.gathered_state(engine)["master"], cases.forward_copies(engine)
    layers, now = lowrank_layers(model), dict(engine.module.named_parameters()) | dict(engine.module.named_buffers())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(masters.pop(name), parameter), f"{name}: the master"
            assert torch.equal(copies[name], parameter.to(dtype)), f"{name}: what forward reads"
        elif name.removesuffix(".weight") not in layers:
            with GatheredParameters([now[name]], enabled=hasattr(now[name], "ds_tensor")):
                assert torch.equal(now[name], parameter.to(dtype)), f"{name}: frozen for good"
    assert not masters
    for name, layer in layers.items():
        if layer.weight is not None:
            stored = engine.frozen.quantize(layer.weight.detach())
            assert torch.equal(_stored(engine, name), stored), f"{name}: the stored copy"
            assert _stored(engine, name).dtype == stored.dtype, f"{name}: the dtype of the stored copy"
    for name in engine.frozen.owned() if engine.frozen.with_masters else ():
        assert torch.equal(engine.frozen.masters[name], layers[name].weight), f"{name}: its master"
    for name, buffer in model.named_buffers():
        assert torch.equal(engine.module.get_buffer(name), buffer), f"{name}: a buffer"


def _stored(engine, name: str) -> torch.Tensor:
    weight = engine.frozen.layers[name].weight
    with GatheredParameters([weight], enabled=hasattr(weight, "ds_tensor")):
        return weight.detach().clone()


def from_a_source(
    stage, precision="fp32", family="llama", offload=None, base=True, spread=False, relora=None, **model_changes
) -> None:
    """A model without values, from a source that every rank can read, or (spread) of which each owns some."""
    relora = relora or cases.relora_config()
    build = FAMILIES[family]
    weights = Weights(build(**model_changes))
    if spread:
        owners = {name: i % dist.get_world_size() for i, name in enumerate(weights.shapes)}
        mine = {name: value for name, value in weights.values.items() if owners[name] == dist.get_rank()}
        weights = OwnedWeights(weights.shapes, owners, mine)
    model = wrap_quietly(without_values(build(**model_changes)), relora, seed=3, base=base)
    kept = list(model.parameters())
    engine = engine_of(model, relora, stage, precision, offload, weights=weights)
    frozen = {id(p) for layer in lowrank_layers(model).values() for p in (layer.weight,)}
    assert {id(p) for p in engine.module.parameters()} - {id(p) for p in kept} <= frozen, "other parameters"
    expected = wrap_quietly(build(**model_changes), relora, seed=3, base=base)
    assert_has_the_values_of(engine, expected, precision)
    assert all(layer.initial_seed is None for layer in lowrank_layers(model).values())
    for step in range(2):
        cases.train_step(engine, step)
    cases.release(engine)


def partitioned(stage, precision, inside: bool, source: bool) -> None:
    """A model built under deepspeed.zero.Init, wrapped afterwards or inside of it.

    source: its own values do not count.
    """
    relora = cases.relora_config()
    settings = {"zero_optimization": {"stage": 3}, "train_batch_size": dist.get_world_size()}
    with deepspeed.zero.Init(config_dict_or_path=settings):  # in fp32
        model = FAMILIES["qwen2"](seed=1)
        if inside:
            wrap_quietly(model, relora, seed=3)
    if not inside:
        wrap_quietly(model, relora, seed=3)
    expected = FAMILIES["qwen2"](seed=1)
    weights = Weights(expected) if source else None
    if not source:
        for name, value in expected.named_parameters():
            parameter = model.get_parameter(name)
            with GatheredParameters([parameter]):
                value.data.copy_(parameter)
    engine = engine_of(model, relora, stage, precision, weights=weights)
    assert_has_the_values_of(engine, wrap_quietly(expected, relora, seed=3), precision)
    cases.train_step(engine, 0)
    cases.release(engine)


class Measured(Weights):
    """Looks at this process's live tensors at every read."""

    peak = 0

    def read(self, name):
        self.peak = max(self.peak, live_bytes())
        return super().read(name)


def live_while_filled(stage: int) -> dict:
    """Bytes of live tensors of this rank, above those before: the most at a read, and when the engine is built."""
    relora = cases.relora_config()
    sizes = dict(hidden_size=64, intermediate_size=96)
    source, before = Measured(FAMILIES["llama"](**sizes)), 0
    model = wrap_quietly(without_values(FAMILIES["llama"](**sizes)), relora)
    before = live_bytes()
    engine = engine_of(model, relora, stage, "fp32", weights=source)
    found = {
        "peak": source.peak - before,
        "built": live_bytes() - before,
        "largest": max(4 * shape.numel() for shape in source.shapes.values()),
        "num_read": source.num_read,
    }
    cases.release(engine)
    return found


def in_pieces(stage: int) -> None:
    """Fill an engine from tensors that are sent in many pieces, and collect it so."""
    usual = shards.PIECE
    shards.PIECE = fill.PIECE = 100
    try:
        from_a_source(stage, "bf16", "qwen2", spread=True)
        relora = cases.relora_config()
        model = wrap_quietly(FAMILIES["llama"](), relora)
        engine, owners = engine_of(model, relora, stage, "fp32"), readers_of(model)
        whole = engine.collect_merged()
        spread = collect_owned(engine.module, engine.shards, engine.frozen, device=engine.device, owners=owners)
        assert spread.shapes.keys() == whole.keys() and len(set(owners.values())) == dist.get_world_size()
        for name in (name for name in whole if owners[name] == dist.get_rank()):
            assert torch.equal(spread.read(name), whole[name]), name
        cases.release(engine)
    finally:
        shards.PIECE = fill.PIECE = usual

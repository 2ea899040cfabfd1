"""The traced peak of a micro-step against the allocations that torch's profiler records."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from relora_ds.config import load_recipe
from relora_ds.lowrank import kernels
from relora_ds.lowrank.base_format import Format
from relora_ds.lowrank.formats import DENSE, DTYPES, format_named
from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.models import recompute
from relora_ds.models.build import build_model
from relora_ds.planning.activations import activation_bytes
from relora_ds.planning.network import network_of
from relora_ds.training.phases import phases_of

SIZES = {"micro_batch_size": 2, "seq_len": 48}


@pytest.fixture(autouse=True)
def nothing_but_what_a_gpu_allocates(monkeypatch):
    """Kernels compute in fp32 on a CPU without units for bf16, and oneDNN packs its operands on a CPU that has them."""
    monkeypatch.setattr(kernels, "SLOW_ON_CPU", set())
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def measured(method, config, precision: str, checkpointing: str = "none", format: Format = DENSE) -> int:
    """Peak bytes that forward and backward allocate beyond what was there, gradients of the weights not kept."""
    model = method.prepare(build_model(config, method.recipe.model, 0)).to(DTYPES[precision]).train()
    for layer in lowrank_layers(model).values():
        stored = format.quantize(layer.weight.detach().float(), DTYPES[precision])
        layer.store_weight(stored, format, as_buffer=False)
        if method.relora.residual_every is not None:
            layer.gradient_sum = GradientSum(layer.shape_of_gradient)
    recompute.apply(model, checkpointing)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    tokens = torch.zeros(SIZES["micro_batch_size"], SIZES["seq_len"], dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model(input_ids=tokens, labels=tokens).loss.backward()
    now = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "precision, vocab_size, names",
    [
        ("fp32", 512, ["warm_start", "relora"]),  # the peak is in the layers
        ("fp32", 4096, ["relora"]),  # in the loss
        ("bf16", 512, ["relora"]),
    ],
)
def test_the_trace_finds_the_peak_of_real_allocations(precision, vocab_size, names):
    recipe = load_recipe("tiny", ["model.preset=llama_20m", f"data.vocab_size={vocab_size}", "relora.r=64"])
    config, _ = network_of(recipe)
    assert config.num_hidden_layers > 3  # extrapolated
    for phase in phases_of(recipe):
        if phase.name in names:
            traced = activation_bytes(phase.method, config, precision=precision, **SIZES)
            assert traced == pytest.approx(measured(phase.method, config, precision), rel=0.05), phase.name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_keep_their_input_for_sums_of_gradients(precision):
    changes = ["method=galore", "warm_start_steps=0", "model.preset=llama_20m", "data.vocab_size=512", "relora.r=64"]
    peaks = []
    for every in ("null", "20"):
        recipe = load_recipe("tiny", [*changes, "relora.restart_every=20", f"relora.residual_every={every}"])
        method = phases_of(recipe)[-1].method
        config, _ = network_of(recipe)
        peaks.append(activation_bytes(method, config, precision=precision, **SIZES))
        assert peaks[-1] == pytest.approx(measured(method, config, precision), rel=0.05)
    assert peaks[1] > 1.05 * peaks[0]


@pytest.mark.parametrize("checkpointing", ["full", "selective", "cheap", "low_rank"])
def test_what_is_computed_twice_is_not_kept(checkpointing):
    recipe = load_recipe("tiny", ["model.preset=llama_20m", "data.vocab_size=512", "relora.r=64"])
    config, _ = network_of(recipe)
    method = phases_of(recipe)[-1].method
    plain, traced = (
        activation_bytes(method, config, precision="fp32", checkpointing=mode, **SIZES)
        for mode in ("none", checkpointing)
    )
    assert traced == pytest.approx(measured(method, config, "fp32", checkpointing), rel=0.02)
    assert traced < 0.75 * plain


@pytest.mark.parametrize(
    "precision, name",
    [
        pytest.param("fp32", "int8", marks=pytest.mark.slow),
        ("fp32", "nf4_double"),
        pytest.param("fp32", "bf16", marks=pytest.mark.slow),
        ("bf16", "nf4"),
    ],
)
def test_one_dense_copy_of_a_packed_weight_at_a_time(precision, name):
    """With checkpointing, so that the peak is where the copy is."""
    recipe = load_recipe("tiny", ["model.preset=llama_20m", "data.vocab_size=512", "relora.r=64"])
    config, _ = network_of(recipe)
    method, format = phases_of(recipe)[-1].method, format_named(name)
    dense, traced = (
        activation_bytes(method, config, precision=precision, checkpointing="full", format=stored, **SIZES)
        for stored in (DENSE, format)
    )
    assert traced == pytest.approx(measured(method, config, precision, "full", format), rel=0.02)
    largest = config.hidden_size * config.intermediate_size * DTYPES[precision].itemsize
    assert dense < traced <= dense + largest


def test_one_folded_weight_at_a_time():
    sizes, traced = ["model.preset=llama_20m", "data.vocab_size=512", "relora.r=64"], {}
    for product in ("separate", "folded"):
        recipe = load_recipe("tiny", [*sizes, f"relora.product={product}"])
        config, _ = network_of(recipe)
        method = phases_of(recipe)[-1].method
        traced[product] = activation_bytes(method, config, precision="fp32", checkpointing="full", **SIZES)
        assert traced[product] == pytest.approx(measured(method, config, "fp32", "full"), rel=0.02)
    largest = config.hidden_size * config.intermediate_size * 4
    assert traced["separate"] < traced["folded"] <= traced["separate"] + largest


def test_activations_grow_with_the_micro_batch_and_shrink_with_the_control():
    recipe = load_recipe("tiny", ["method=control", "model.preset=llama_20m", "relora.r=16"])
    config, _ = network_of(recipe)
    (control,) = phases_of(recipe)
    (full,) = phases_of(load_recipe("tiny", ["method=full", "model.preset=llama_20m"]))
    one, eight = (
        activation_bytes(full.method, config, precision="bf16", micro_batch_size=n, seq_len=64) for n in (1, 8)
    )
    assert eight == pytest.approx(8 * one, rel=0.02)
    assert activation_bytes(control.method, config, precision="bf16", micro_batch_size=8, seq_len=64) < eight

"""The traced peak of a micro-step against the allocations that torch's profiler records."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from relora_ds.config import load_recipe
from relora_ds.models.build import build_model
from relora_ds.planning.activations import DTYPES, activation_bytes
from relora_ds.planning.network import network_of
from relora_ds.training.phases import phases_of

SIZES = {"micro_batch_size": 2, "seq_len": 48}


def measured(method, config, precision: str) -> int:
    """Peak bytes that forward and backward allocate beyond what was there, gradients of the weights not kept."""
    model = method.prepare(build_model(config, method.recipe.model, 0)).to(DTYPES[precision])
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


@pytest.mark.parametrize("precision, vocab_size, names", [
    ("fp32", 512, ["warm_start", "relora"]),  # the peak is in the layers
    ("fp32", 4096, ["relora"]),  # in the loss
    ("bf16", 512, ["relora"])])
def test_the_trace_finds_the_peak_of_real_allocations(precision, vocab_size, names):
    recipe = load_recipe("tiny", ["model.preset=llama_20m", f"data.vocab_size={vocab_size}", "relora.r=64"])
    config, _ = network_of(recipe)
    assert config.num_hidden_layers > 3  # extrapolated
    for phase in phases_of(recipe):
        if phase.name in names:
            traced = activation_bytes(phase.method, config, precision=precision, **SIZES)
            assert traced == pytest.approx(measured(phase.method, config, precision), rel=0.05), phase.name


def test_activations_grow_with_the_micro_batch_and_shrink_with_the_control():
    recipe = load_recipe("tiny", ["method=control", "model.preset=llama_20m", "relora.r=16"])
    config, _ = network_of(recipe)
    (control,) = phases_of(recipe)
    (full,) = phases_of(load_recipe("tiny", ["method=full", "model.preset=llama_20m"]))
    one, eight = (activation_bytes(full.method, config, precision="bf16", micro_batch_size=n, seq_len=64)
                  for n in (1, 8))
    assert eight == pytest.approx(8 * one, rel=0.02)
    assert activation_bytes(control.method, config, precision="bf16", micro_batch_size=8, seq_len=64) < eight

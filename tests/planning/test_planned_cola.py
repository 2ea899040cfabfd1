"""What is planned for CoLA's network: the bytes that real engines send, and the memory that its traced steps take."""

import pytest

from relora_ds.config import load_recipe, method_of
from relora_ds.methods import full_rank
from relora_ds.planning.activations import activation_bytes, prepared_config
from relora_ds.planning.network import network_of
from tests.planning.engines import overrides, planned, sent_in_a_step
from tests.planning.test_activations import SIZES, measured, nothing_but_what_a_gpu_allocates  # noqa: F401 (a fixture)
from tests.ranks import ranks


@pytest.mark.parametrize(
    "method, stage, precision",
    [
        ("cola", 3, "bf16"),
        pytest.param("cola_m", 1, "fp32", marks=pytest.mark.slow),
        pytest.param("cola", 0, "fp32", marks=pytest.mark.slow),
        pytest.param("cola_m", 2, "bf16", marks=pytest.mark.slow),
    ],
)
def test_bytes_are_those_that_are_sent(method, stage, precision):
    changes = overrides(stage, precision, method, 1, "cola.r=16")
    expected = planned(changes)
    assert expected.restart is None
    for result in ranks(2).run(sent_in_a_step, changes):
        assert result == pytest.approx(expected.step, rel=0.01)


@pytest.mark.slow
def test_what_stage_3_gathers_for_the_repetition_is_counted_at_the_most():
    """It keeps what trains from the repetition to the backward, in a network as small as this one."""
    plain, recomputed = (overrides(3, "fp32", method, 1, "cola.r=16") for method in ("cola", "cola_m"))
    for payload, _ in ranks(2).run(sent_in_a_step, recomputed):
        assert planned(plain).step[0] == pytest.approx(payload, rel=0.01)
        assert payload < planned(recomputed).step[0]


@pytest.mark.parametrize("name", ["cola_m", pytest.param("cola", marks=pytest.mark.slow)])
def test_the_trace_finds_the_peak_of_real_allocations(name):
    recipe = load_recipe("tiny", [f"method={name}", "model.preset=llama_20m", "data.vocab_size=512", "cola.r=64"])
    method, (config, _), mode = method_of(recipe), network_of(recipe), recipe.activation_checkpointing
    traced = activation_bytes(method, config, precision="fp32", checkpointing=mode, **SIZES)
    factors = prepared_config(method, config)
    assert traced == pytest.approx(measured(full_rank(recipe), factors, "fp32", mode), rel=0.05)

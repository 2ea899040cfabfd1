"""What is planned for CR-Net's network: the bytes that real engines send, and the memory that its traced steps take."""

import pytest

from relora_ds.config import load_recipe, method_of
from relora_ds.methods import full_rank
from relora_ds.models import recompute
from relora_ds.planning.activations import activation_bytes, prepared_config
from relora_ds.planning.network import network_of
from tests.planning.engines import overrides, planned, sent_in_a_step
from tests.planning.test_activations import SIZES, measured, nothing_but_what_a_gpu_allocates  # noqa: F401 (a fixture)
from tests.ranks import ranks


@pytest.mark.parametrize(
    "stage, precision",
    [
        (3, "bf16"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0, "fp32"), (1, "fp32"), (2, "bf16"))),
    ],
)
def test_bytes_are_those_that_are_sent(stage, precision):
    changes = overrides(stage, precision, "crnet", 1, "crnet.r=16")
    expected = planned(changes)
    assert expected.restart is None
    for result in ranks(2).run(sent_in_a_step, changes):
        assert result == pytest.approx(expected.step, rel=0.01)


@pytest.mark.parametrize("depth", [21])
def test_every_eighth_layer_is_counted(depth):
    """What is extrapolated from fewer layers is what a trace of all of them finds."""
    recipe = load_recipe("tiny", ["method=crnet", "warm_start_steps=0", "crnet.r=8"])
    method, (config, _) = method_of(recipe), network_of(recipe)
    config.num_hidden_layers = depth
    how = dict(precision="fp32", checkpointing="inverted", micro_batch_size=2, seq_len=32)
    found = activation_bytes(method, config, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "period", lambda mode: depth)
        assert found == activation_bytes(method, config, **how)


@pytest.mark.parametrize("mode", ["none", "inverted", pytest.param("full", marks=pytest.mark.slow)])
def test_the_trace_finds_the_peak_of_real_allocations(mode):
    changes = ["method=crnet", "warm_start_steps=0", "model.preset=llama_20m", "data.vocab_size=512", "crnet.r=64"]
    recipe = load_recipe("tiny", changes)
    method, (config, _) = method_of(recipe), network_of(recipe)
    traced = activation_bytes(method, config, precision="fp32", checkpointing=mode, **SIZES)
    factors = prepared_config(method, config)
    assert traced == pytest.approx(measured(full_rank(recipe), factors, "fp32", mode), rel=0.05)

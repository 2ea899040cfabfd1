"""Engines at every stage, on emulated GPUs: steps, restarts, collecting, checkpoints, release."""

import pytest

from relora_ds.config import SwitchLoRAConfig
from tests.emulated_cuda import engines
from tests.emulated_cuda.factors import FACTORS
from tests.emulated_cuda.pool import emulated_ranks
from tests.islands.servers import serving
from tests.zero.test_timeouts import DAY, watched

CASES = {
    "stage 0": dict(stage=0),
    "stage 1": dict(stage=1),
    "stage 2, no masters, A from gradients": dict(stage=2, relora=dict(restart_init="gradient", frozen_master="none")),
    "stage 3, A random": dict(stage=3, relora=dict(restart_init="random")),
    "optimizer offloaded": dict(stage=1, offload=True),
    "nf4, sharded": dict(stage=3, relora=dict(frozen_dtype="nf4", lora_dropout=0.1)),
    "int8, replicated": dict(stage=3, relora=dict(frozen_dtype="int8", frozen_placement="replicated")),
    "residual updates": dict(
        stage=3,
        relora=dict(trains="B", restart_init="random", optimizer_reset="zero", residual_every=3),
    ),
    "switches": dict(
        stage=3,
        relora=dict(restart_every=None, lora_alpha=1, frozen_dtype="fp32"),
        switching=SwitchLoRAConfig(interval=4, ratio=0.9, freeze_steps=2),
    ),
    "singular vectors": dict(stage=1, **FACTORS),
    "singular vectors, all offloaded": dict(
        stage=3, offload=True, zero={"offload_param": {"device": "cpu"}}, **FACTORS
    ),
    "fp8, which multiplies": dict(stage=1, relora=dict(frozen_dtype="fp8", frozen_master="device")),
}
# What the others do, in other combinations; test_layers.py has products in fp8.
REPEATED = ("stage 0", "singular vectors", "stage 1", "stage 3, A random", "int8, replicated", "fp8, which multiplies")


@pytest.mark.parametrize(
    "case",
    [pytest.param(CASES[name], marks=[pytest.mark.slow] * (name in REPEATED)) for name in CASES],
    ids=CASES,
)
def test_an_engine_from_its_building_to_its_release(case):
    results = emulated_ranks().run(engines.live_and_let_go, **case)
    for result in results:
        restarts = case.get("relora", {}).get("restart_every", engines.EVERY) is not None
        assert result["restarts"] == ([engines.EVERY, 2 * engines.EVERY] if restarts else [])
        assert result["loss"] < 5
        assert result["collected on the GPU"] == []
        assert result["left"] <= 64 and result["left page-locked"] == 0
    # DeepSpeed's own offloading has memory of this kind too.
    assert "offload" in case or sum(result["page-locked a weight"] for result in results) <= 4


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_memory_of_a_restart_does_not_grow_with_the_network(stage):
    """Each rank merges one layer at a time: of further ones there are only the factors."""
    small, large = (emulated_ranks().run(engines.memory_of_a_restart, stage, layers) for layers in (2, 6))
    for (peak, weights), (larger_peak, more_weights) in zip(small, large, strict=True):
        assert (larger_peak - peak) / (more_weights - weights) < 0.5, "bytes of a further weight"


@pytest.mark.parametrize(
    ("stage", "precision", "outer", "relora"),
    [
        (1, "bf16", "nesterov", {}),
        pytest.param(1, "bf16", "average", {}, marks=pytest.mark.slow),
        pytest.param(0, "fp32", "nesterov", {}, marks=pytest.mark.slow),
        pytest.param(2, "bf16", "nesterov", {"frozen_master": "none"}, marks=pytest.mark.slow),
        pytest.param(3, "bf16", "nesterov", {"frozen_dtype": "int8"}, marks=pytest.mark.slow),
    ],
)
def test_an_exchange_needs_no_more_of_a_gpu_than_a_restart(stage, precision, outer, relora, tmp_path):
    """Momenta are on the host, and of one layer at a time on the GPU."""
    with serving(tmp_path) as server:
        case = (engines.memory_of_exchanges, server.address, stage, precision, outer)
        for peaks, expected in emulated_ranks().run(*case, **relora):
            assert len(peaks) == 2 and 0.8 * expected < max(peaks) <= expected


def test_the_watchdog_is_quicker_than_every_collective_over_nccl():
    """The groups of ranks, NCCL's and gloo's, wait longer. Here: a file of its own may start the ranks once more."""
    for world, all_groups in emulated_ranks().run(watched):
        assert min(world.values()) > DAY
        assert len(all_groups) >= len(world) + 2 and min(all_groups.values()) > DAY

"""The cost model: what it is made of."""

import pytest

from relora_ds.config import load_recipe
from relora_ds.methods import full_rank, method_of
from relora_ds.planning.cluster import Cluster, Step, Wire, parse_cluster, passes_of, predict_step, with_batch_for
from relora_ds.planning.cost import cost
from relora_ds.planning.network import network_of, shapes_of
from relora_ds.training.preflight import Resolved, resolve

FAST, SLOW = Wire(100e9, 1e-6), Wire(1e9, 50e-6)


@pytest.mark.parametrize(
    ("nodes", "devices", "seconds"),
    [
        (1, 1, 0.0),  # nobody to talk to
        (1, 8, 4e9 / 100e9 + 3 * 7 * 1e-6),
        (2, 1, 4e9 / 1e9 + 3 * 50e-6),
        (8, 4, 4e9 / 1e9 + 3 * (3 * 50e-6 + 3 * 1e-6)),
    ],
)
def test_bytes_over_the_slowest_wire_and_latency_of_every_pass(nodes, devices, seconds):
    assert Cluster(nodes, devices, FAST, SLOW).communication(4e9, passes=3) == pytest.approx(seconds)


def test_clusters_in_several_places_are_one_over_the_slow_wire_between_them():
    together = Cluster(2, 4, FAST, SLOW, sites=3, outside=Wire(1e6, 0.1))
    assert together.world_size == 24
    # log2(3) hops of the ring's tree are over that wire, rounded up.
    expected = 4e6 / 1e6 + 3 * (50e-6 + 3 * 1e-6 + 2 * 0.1)
    assert together.communication(4e6, passes=3) == pytest.approx(expected)
    assert Cluster(1, 1, FAST, SLOW, sites=2, outside=SLOW).communication(1e9, passes=0) == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["8", "0x8", "x8", "8x", "8x-1", "axb"])
def test_what_is_no_cluster(text):
    with pytest.raises(ValueError, match="is no cluster"):
        parse_cluster(text)


def test_clusters_are_hosts_times_devices():
    assert parse_cluster("64x8") == (64, 8)


@pytest.mark.parametrize(("world_size", "batch", "micro"), [(1, 8, 4), (2, 8, 4), (4, 8, 2), (3, 9, 3), (16, 16, 1)])
def test_the_batch_is_the_nearest_that_the_ranks_can_split(world_size, batch, micro):
    recipe = with_batch_for(load_recipe("tiny"), world_size)  # 8 rows, micro-batches of 4
    assert (recipe.batch_sequences, recipe.train.micro_batch_size) == (batch, micro)


def predicted(*changes: str) -> tuple[Step, Resolved]:
    resolved = resolve("tiny", ["method=galore", "relora.restart_every=20", *changes], 2, to_run=False)
    config, _ = network_of(resolved.recipe)
    method = method_of(resolved.recipe)
    return predict_step(resolved, method, config, Cluster(1, 2, FAST, SLOW), stage=1, device_flops=1e12), resolved


def test_owners_send_every_layer_by_itself():
    """The 14 linears of two layers: a reduced gradient and a broadcast weight each."""
    resolved = resolve("tiny", ["method=muon"], 2, to_run=False)
    config, _ = network_of(resolved.recipe)
    muon, full = (shapes_of(method, config) for method in (method_of(resolved.recipe), full_rank(resolved.recipe)))
    for stage in (0, 1, 3):
        zero = {"stage": stage, "reduce_bucket_size": 10**9, "allgather_bucket_size": 10**9}
        zero["stage3_prefetch_bucket_size"] = 10**9
        assert passes_of(muon, zero, 2) - passes_of(full, zero, 2) == 2 * 14


def test_a_step_has_its_share_of_a_residual_update():
    without, _ = predicted()
    step, resolved = predicted("relora.residual_every=10")
    found = cost(resolved, method_of(resolved.recipe), network_of(resolved.recipe)[0], stage=1, world_size=2)
    assert found.residual is not None
    assert step.wire_bytes - without.wire_bytes == pytest.approx(found.residual[1] / 10)
    assert step.compute > without.compute

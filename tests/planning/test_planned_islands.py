"""The mean step of islands, by hand."""

import pytest

from relora_ds.methods import full_rank, method_of
from relora_ds.planning.cluster import Cluster, Wire, predict_step
from relora_ds.planning.network import network_of, shapes_of
from relora_ds.planning.planned_islands import exchange_seconds, predict_islands
from relora_ds.training.preflight import resolve

INSIDE, BETWEEN, OUTSIDE = Wire(300e9, 5e-6), Wire(1e9, 20e-6), Wire(12.5e6, 0.025)
COUNT, EVERY, RANKS, FLOPS = 4, 1000, 8, 150e12


@pytest.mark.parametrize(
    ("count", "seconds"),
    [
        (1, 1 + 2 * 5 * 0.05),
        (3, 3 + 2 * 9 * 0.05),  # sends a second, receives two; 9 round trips
    ],
)
def test_an_exchange(count, seconds):
    assert exchange_seconds(1_000_000, count, Wire(1e6, 0.05)) == pytest.approx(seconds)


def predicted(*changes: str, full: bool = False):
    overrides = [
        "model.preset=llama_1b",
        "data.vocab_size=32000",
        "relora.r=128",
        f"relora.restart_every={EVERY}",
        "train.micro_batch_size=1",
        f"train.batch_sequences={RANKS}",
        "train.steps=4000",
        "precision=bf16",
        "warm_start_steps=0",
        f"islands.count={COUNT}",
        "islands.address=host:5555",
        "islands.compress=int8",
        *changes,
    ]
    resolved = resolve("tiny", overrides, RANKS, to_run=False)
    method, (config, _) = (full_rank if full else method_of)(resolved.recipe), network_of(resolved.recipe)
    cluster, shapes = Cluster(1, RANKS, INSIDE, BETWEEN), shapes_of(method, config)
    step = predict_step(resolved, method, config, cluster, stage=0, device_flops=FLOPS, shapes=shapes)
    return step, predict_islands(resolved, method, config, cluster, step, OUTSIDE, device_flops=FLOPS, shapes=shapes)


def test_one_billion_at_100_megabits():
    step, found = predicted()
    h, ffn, layers, vocab, r = 2048, 5461, 24, 32000, 128
    factors, rest = layers * r * (4 * 2 * h + 3 * (h + ffn)), 2 * vocab * h + (2 * layers + 1) * h
    sent = 4 * factors + rest + 2 * rest // 64  # a scale of 2 bytes for 64 elements
    assert (found.every, found.exchange_bytes) == (EVERY, sent)
    exchange = COUNT * sent / 12.5e6 + 2 * (5 + 2 * 3) * 0.025
    assert found.exchange == pytest.approx(exchange)
    assert found.seconds == pytest.approx(step.seconds + exchange / EVERY)
    assert found.share == pytest.approx(exchange / EVERY / (step.seconds + exchange / EVERY))
    assert found.tokens_per_s == pytest.approx(COUNT * step.batch_sequences * 64 / found.seconds)
    together = found.data_parallel
    assert (together.world_size, together.batch_sequences) == (COUNT * RANKS, COUNT * RANKS)
    assert together.compute == pytest.approx(step.compute)
    ring = 2 * 2 * (factors + rest) * 31 / 32  # in bf16
    assert together.communication == pytest.approx(ring / 12.5e6, rel=0.01)


def test_full_rank_exchanges_where_the_recipe_says():
    assert predicted(full=True)[1] is None
    _, found = predicted("islands.sync_every=500", full=True)
    assert found.every == 500

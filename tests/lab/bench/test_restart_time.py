"""The pause of a restart is measured, and set against a step of the recipe's batch."""

import argparse

from relora_ds.lab.bench import restart_time
from tests.ranks import ranks


def measured() -> dict:
    return restart_time.measure(
        argparse.Namespace(
            presets=["llama_9m"],
            variants=["ours, bf16", "ours, one-sided, warm sketch"],
            masters=["cpu"],
            stages=[1],
            r=8,
            vocab_size=1000,
            seq_len=32,
            micro_batch_size=1,
            tokens_per_step=6400,
            precision="bf16",
            restarts=3,
        )
    )


def test_pauses():
    result, _ = ranks(2).run(measured)
    assert [row["subspace_bytes"] > 0 for row in result["rows"]] == [False, True]
    for row in result["rows"]:
        assert len(row["pauses_s"]) == 3 and row["world_size"] == 2
        assert all(0 < own < pause for own, pause in zip(row["without_drift_s"], row["pauses_s"], strict=True))
        assert row["wire"] > 1e6  # the merged weights are broadcast
    one, other = restart_time.markdown(result).splitlines()[4:6]
    assert one.startswith("| llama_9m | 2 | 1 | bf16 | cpu |") and "0.0 MB" in one
    assert other.startswith("| llama_9m | 2 | 1 | one-sided, warm sketch | cpu |") and "0.0 MB" not in other

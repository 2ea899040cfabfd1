"""Host memory while engines are built, and that it does not grow with the ranks."""

import argparse

import pytest

from relora_ds.lab.bench import host_memory

MOST = 1.3  # fp32 copies of the network on a host, besides the engines


@pytest.mark.slow
def test_a_host_holds_one_copy_at_most_however_many_ranks_it_has():
    result = host_memory.run(
        argparse.Namespace(preset="llama_20m", vocab_size=32_000, r=64, precision="fp32", stages=[3], ranks=[2])
    )
    (row,) = result["rows"]
    assert row["world_size"] == 2 and result["weights"] > 19e6
    for moment in ("build", "switch"):
        assert row[moment]["state_bytes"] > 4 * result["weights"], moment  # the engine was built
        assert host_memory.copies(row, moment, result["weights"]) < MOST, moment
    assert host_memory.markdown(result).splitlines()[-1].startswith("| 3 | 2 | ")

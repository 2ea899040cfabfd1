"""The bytes are those of the files; between restarts the frozen weights are not among them."""

import argparse

from relora_ds.lab.bench import checkpoint_cost as bench
from tests.ranks import ranks


def measure(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(argv))


def test_what_is_written(tmp_path):
    (result,) = ranks(1).run(
        measure, ["--preset", "tiny", "--r", "4", "--vocab-size", "512", "--repeats", "1", "--directory", str(tmp_path)]
    )
    first, between, same, full = result["rows"]
    trained, frozen, total = 75_712, 100_352, 176_064
    assert 12 * trained < between["bytes"] < 12 * trained + 40_000  # fp32 masters and two moments
    assert 4 * frozen <= first["bytes"] - between["bytes"] < 12 * frozen  # fp32 masters, the ledger's two samples
    assert 12 * trained + 2 * total < same["bytes"] < full["bytes"]
    assert list(tmp_path.iterdir()) == []
    assert "| ours, between restarts |" in bench.markdown(result)

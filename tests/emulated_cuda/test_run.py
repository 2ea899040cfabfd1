"""A whole run on emulated GPUs, from tokens to export."""

import pytest

from tests.emulated_cuda import runs
from tests.emulated_cuda.pool import emulated_ranks
from tests.training.runs import lines


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_from_tokens_to_export(stage, tmp_path):
    results = emulated_ranks().run(
        runs.train,
        [
            f"run_dir={tmp_path / 'run'}",
            f"deepspeed=zero{stage}",
            "precision=bf16",
            "checkpoint.every=15",
            "eval.every=20",
        ],
    )
    for steps, left in results:
        assert len(steps) == 40 and left <= 64
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert [line["restarts"] for line in lines(tmp_path / "run", "restart")] == [1, 2]
    peaks = {line["phase"]: line["peak_memory_bytes"] for line in lines(tmp_path / "run", "train")}
    assert peaks["relora"] < peaks["warm_start"], "the phases share one peak"

"""A checkpoint is of the moment at which it was begun, whatever training does while it is written."""

import time
from pathlib import Path
from unittest import mock

import pytest

from relora_ds.checkpoint import rank_files, store
from tests.ranks import ranks
from tests.training.runs import lines, losses, run, train

SETTINGS = ("train.steps=24", "checkpoint.every=18", "checkpoint.keep_last=99", "eval.samples=0")


def train_with_a_slow_disk(run_dir: Path, overrides: list[str]) -> None:
    """On a rank: train; no file of a checkpoint is written before there was a restart."""
    real = rank_files.save_file

    def slow(*args):
        for _ in range(600):
            if lines(run_dir, "restart"):
                break
            time.sleep(0.1)
        real(*args)

    with mock.patch.object(rank_files, "save_file", slow):
        train("tiny", [f"run_dir={run_dir}", *overrides])


@pytest.mark.parametrize(
    "settings",
    [
        ("relora.frozen_dtype=int8", "deepspeed=zero3"),
        *[
            pytest.param(more, marks=pytest.mark.slow)
            for more in (
                ("precision=bf16",),
                ("precision=fp32", "deepspeed=zero0"),
                ("precision=bf16", "relora.frozen_master=none"),
                ("precision=bf16", "relora.frozen_master=device"),
            )
        ],
    ],
    ids="-".join,
)
def test_a_restart_while_it_is_written_does_not_tear_it(tmp_path, settings):
    """The restart after step 20 falls into the time that the checkpoint after step 18 takes."""
    ranks(2).run(train_with_a_slow_disk, tmp_path / "whole", [*SETTINGS, *settings])
    first, _ = lines(tmp_path / "whole", "checkpoint")
    (restart,) = lines(tmp_path / "whole", "restart")
    assert (first["step"], restart["step"]) == (18, 20)
    assert first["stall_s"] < first["write_s"] < 60, "training waited"
    directory = tmp_path / "whole" / "checkpoints" / "step_00000018"
    assert store.verify(directory) == [] and (directory / "manifest.json").stat().st_mtime > restart["time"]
    run(tmp_path / "on", f"resume={directory}", *SETTINGS, *settings)
    assert losses(tmp_path / "on") == {step: loss for step, loss in losses(tmp_path / "whole").items() if step > 18}
    assert [r["checksum"] for r in lines(tmp_path / "on", "restart")] == [restart["checksum"]]

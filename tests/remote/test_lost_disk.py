"""A run whose disk is lost continues from the store, to the bit."""

import pytest
import torch.distributed as dist

from relora_ds.training.metrics_log import read_metrics
from tests.faults.kills import Mortal, require_equal
from tests.ranks import ranks
from tests.remote.runs import fit, settings_of, stored, wipe


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_in_an_upload_and_lost_its_disk_ends_as_the_untouched_one(tmp_path, world_size):
    whole, run, store = tmp_path / "whole" / "r", tmp_path / "r", tmp_path / "store"
    ranks(world_size).run(fit, [f"run_dir={whole}"])
    mortal = Mortal(world_size)
    with pytest.raises(AssertionError, match="it died"):
        mortal.run(fit, settings_of(run, store), [("dies_after", "step_00000006/manifest.json")])
    found = stored(store)
    assert found.pop("step_00000006") and found and not any(found.values()), "half of the next one is there"
    wipe(run)
    ((said, *_), *_) = ranks(world_size).run(fit, settings_of(run, store))
    assert "resuming after step 6" in said and "resume: fetched faulty://" in said
    require_equal(run, whole)
    assert [line["step"] for line in read_metrics(run) if line["kind"] == "train"] == list(range(1, 25))
    assert stored(store) == {"step_00000018": True, "step_00000024": True}, "what was half there is deleted"


@pytest.mark.slow
def test_hosts_with_disks_of_their_own_upload_and_fetch_what_their_ranks_need(tmp_path):
    whole, store = tmp_path / "whole" / "r", tmp_path / "store"
    ranks(2).run(fit, [f"run_dir={whole}"])
    ranks(2).run(fit_on_its_host, tmp_path, store, sigterm_at=12)
    newest, is_complete = max(stored(store).items())
    assert is_complete and newest > "step_00000012"
    for rank in (0, 1):
        wipe(tmp_path / f"host_{rank}")
    ((said, *_), *_) = ranks(2).run(fit_on_its_host, tmp_path, store)
    assert f"resume: fetched faulty://{store}/checkpoints/{newest}" in said
    for rank in (0, 1):
        there = {path.name for path in (tmp_path / f"host_{rank}" / "r/checkpoints" / newest).glob("trained_*")}
        assert there == {f"trained_{rank:05d}.safetensors"}
    require_equal(tmp_path / "host_0" / "r", whole)


def fit_on_its_host(directory, store, **options):
    run_dir = directory / f"host_{dist.get_rank()}" / "r"
    return fit([*settings_of(run_dir, store), "checkpoint.keep_last=9"], **options)

"""A store that refuses or is slow while a run trains: it is said, tried again, and never ends the run."""

from relora_ds.checkpoint import store as disk
from relora_ds.checkpoint.find import ResumeError
from relora_ds.remote.lease import Lease
from relora_ds.remote.place import Place
from tests.ranks import ranks
from tests.remote.runs import fit, quick_lease, settings_of, stored
from tests.remote.stores import FaultyStore, url
from tests.training.runs import lines, status


def train(*arguments, **options):
    return ranks(1).run(fit_and_count, *arguments, **options)[0]


def fit_and_count(*arguments, **options):
    return *fit(*arguments, **options), FaultyStore.most


def test_a_store_that_refuses_for_a_while_is_said_and_the_next_checkpoint_is_uploaded(tmp_path):
    run, store = tmp_path / "r", tmp_path / "store"
    refusals = [("fails", "put", "step_00000012"), ("fails", "put", "step_00000024"), ("takes", 0.3, "step_00000024")]
    said, heard, *_ = train(settings_of(run, store), refusals)
    assert stored(store)["step_00000018"]
    last = "the checkpoint after step 24 is not in faulty://"
    assert status(run)["state"] == "done" and status(run)["reason"].startswith(last)
    told = {line["step"]: line["error"] for line in lines(run, "upload")}
    assert told[18] is None and "PermissionError: Access Denied: " in told[24]
    assert [one.step for one in heard.uploads].count(24) == 2, "the last one is tried twice"
    assert "warning: the upload of the checkpoint after step 24 failed: PermissionError: Access Denied" in said
    assert "step 18  uploaded: " in said and disk.verify(run / "checkpoints" / "step_00000024") == []


def test_uploads_that_are_slower_than_checkpoints_skip_some_and_keep_what_they_read(tmp_path):
    run, store = tmp_path / "r", tmp_path / "store"
    settings = [*settings_of(run, store), "train.steps=14", "checkpoint.every=2", "checkpoint.keep_last=1"]
    _, heard, _, most = train(settings, [("waits_for", f"{run}/checkpoints/step_00000010", "step_00000002")])
    first, *others = heard.uploads
    assert first.step == 2 and first.error is None, "retention has not deleted what was being uploaded"
    assert others[0].step >= 8 and others[0].skipped == others[0].step // 2 - 2 and others[0].error is None
    assert others[-1].step == 14 and most == 1
    assert stored(store) == {"step_00000014": True}
    assert heard.on_disk <= 4 and [path.name for path in disk.directories(run)] == ["step_00000014"]


def refused(overrides: list[str]) -> str:
    """On a rank: why it was not allowed to train."""
    try:
        fit(overrides, dead_s=20)
    except ResumeError as error:
        return str(error)
    raise AssertionError("it trained")


def test_a_run_that_another_process_uploads_is_left_alone(tmp_path):
    with quick_lease():
        other = Lease(Place(url(tmp_path / "store")), "process 1 on h", "runs/r")
        other.take("")
        for message in ranks(2).run(refused, settings_of(tmp_path / "r", tmp_path / "store")):
            assert "/store is being written by process 1 on h (run_dir runs/r); stop that one" in message
        other.close()
    assert not (tmp_path / "r").exists() and not stored(tmp_path / "store")


def test_a_run_that_is_stopped_waits_for_its_upload_for_a_bounded_time(tmp_path):
    run, store = tmp_path / "r", tmp_path / "store"
    settings = [*settings_of(run, store), "checkpoint.remote_stop_s=1", "checkpoint.every=null"]
    *_, stopped, _ = train(settings, [("takes", 15)], sigterm_at=12)
    assert "resume with resume=auto on this disk, as the last upload to faulty://" in stopped
    assert stopped.endswith(" did not end within 1 s")
    *_, stopped, _ = train([*settings, "checkpoint.remote_stop_s=20"], [], sigterm_at=18)
    assert stopped.endswith("resume with resume=auto") and stored(store)["step_00000019"]

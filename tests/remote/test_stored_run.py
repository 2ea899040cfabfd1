"""What is deleted in a store, and what never is."""

import pytest

from relora_ds.remote.place import Place
from relora_ds.remote.stored_run import StoredRun


@pytest.fixture
def run(tmp_path):
    place = Place(f"file://{tmp_path}/store")
    for step in (5, 10, 15, 20):
        for name in ("manifest.json", "trained_00000.safetensors"):
            place.write(f"checkpoints/step_{step:08d}/{name}", b"x")
    place.write("checkpoints/step_00000025/trained_00000.safetensors", b"x")
    place.write("checkpoints/notes/step_00000005/manifest.json", b"x")
    place.write("recipe.yaml", b"run_dir: runs/mine\n")
    place.write("notes.md", b"x")
    return StoredRun(place)


def steps(run: StoredRun) -> list[int]:
    return [int(tag.removeprefix("step_")) for tag in run.complete()]


def test_retention_is_that_of_the_disk_and_leftovers_go(run):
    assert steps(run) == [20, 15, 10, 5]
    run.prune(keep_last=1, keep_every=10)
    assert steps(run) == [20, 10] and "step_00000025" not in run.checkpoints()
    assert {"notes.md", "checkpoints/notes/step_00000005/manifest.json"} <= run.place.files().keys()


def test_going_back_puts_later_checkpoints_aside(run):
    run.drop_after(10)
    assert steps(run) == [10, 5]
    assert "checkpoints/replaced/step_00000020/manifest.json" in run.place.files()


def test_overwriting_deletes_what_a_run_uploads_and_nothing_else(run):
    run.drop_after(15)
    run.delete()
    assert run.begun_in() is None
    assert sorted(run.place.files()) == ["checkpoints/notes/step_00000005/manifest.json", "notes.md"]

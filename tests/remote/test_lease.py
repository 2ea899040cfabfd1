"""A store has one writer."""

import json
import threading
import time

import pytest

from relora_ds.remote import lease
from relora_ds.remote.lease import Lease
from relora_ds.remote.place import Place, RemoteError
from relora_ds.training.lock import NAME
from relora_ds.training.run_directory import Claim
from tests.remote import stores
from tests.remote.runs import quick_lease
from tests.training.run_directories import recipe_of


@pytest.fixture
def place(tmp_path):
    with quick_lease(dead_s=2.0):
        yield Place(f"file://{tmp_path}/store")


def wait_for(is_so) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def test_a_second_process_is_refused_while_the_first_one_lives(place):
    first, second = (Lease(place, f"process {number} on h", f"runs/{number}") for number in (1, 2))
    first.take("")
    with pytest.raises(ValueError, match=r"is being written by process 1 on h \(run_dir runs/1\); stop that one"):
        second.take("")
    first.close()
    assert not place.files(), "it is given up"
    second.take("")
    second.close()


def test_one_that_is_not_renewed_is_taken_over_after_a_while(place):
    about = {"holder": "process 1 on h", "run_dir": "runs/1", "start": "x", "renewals": 3}
    place.write(lease.NAME, json.dumps(about).encode())
    started = time.monotonic()
    Lease(place, "process 2 on h", "runs/1").take("process 1 on h")
    assert time.monotonic() - started < 1.9, "it is known to be dead"
    place.write(lease.NAME, json.dumps(about).encode())
    started = time.monotonic()
    Lease(place, "process 2 on h", "runs/2").take("process 1 on h")
    assert time.monotonic() - started > 2.0, "of another run directory that is not known"


def test_the_lock_of_the_run_directory_tells_who_had_it_before(tmp_path):
    (tmp_path / NAME).write_text("process 1 on elsewhere\n")
    claim = Claim(recipe_of(tmp_path, "resume=auto"))
    assert claim.previous_holder == "process 1 on elsewhere"
    claim.close()


def test_a_process_that_was_taken_over_stops_writing(place):
    first = Lease(place, "process 1 on h", "runs/1")
    first.take("")
    first.require()
    other = json.dumps({"holder": "process 2 on h", "run_dir": "runs/1", "start": "y"}).encode()
    place.write(lease.NAME, other)
    wait_for(lambda: first.lost)
    with pytest.raises(RemoteError, match=r"process 2 on h \(run_dir runs/1\) writes it now"):
        first.require()
    first.close()
    assert place.read(lease.NAME) == other


def test_a_store_that_hangs_costs_a_process_that_stops_a_few_seconds(tmp_path, monkeypatch):
    """The launcher kills it 30 s after SIGTERM, 20 of which are the last upload's."""
    hanging, goes_on = threading.Event(), threading.Event()

    def hang(operation: str, path: str) -> None:
        if hanging.is_set():
            goes_on.wait(60)

    monkeypatch.setattr(stores, "FAULTS", [hang])
    with quick_lease():
        one = Lease(Place(stores.url(tmp_path / "store")), "process 1 on h", "runs/1")
        one.take("")
        hanging.set()
        time.sleep(0.2)  # it hangs in a renewal
        started = time.monotonic()
        one.close()
        assert time.monotonic() - started < 5
        goes_on.set()
        wait_for(lambda: not (tmp_path / "store" / lease.NAME).exists())

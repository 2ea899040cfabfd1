"""The protocol that most will use, against a server on this machine.

pip install "moto[server]" s3fs
"""

import os
import signal
import uuid

import pytest

from relora_ds.training.hooks import Hook
from relora_ds.training.preflight import check
from relora_ds.training.remote_rules import early_remote_problems
from relora_ds.training.trainer import Trainer
from tests.faults.kills import Mortal, require_equal
from tests.ranks import ranks
from tests.remote.runs import SETTINGS, fit, quick_lease, wipe
from tests.remote.test_refused import recipe

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")

pytestmark = pytest.mark.slow


@pytest.fixture
def environment(monkeypatch):
    """A server with a bucket, and what a process needs to find it."""
    import fsspec

    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    found = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*moto.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4()}"  # servers of one process share what they hold
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    yield found | {"BUCKET": name}
    moto.stop()


class DieAfterAnUpload(Hook):
    def __init__(self):
        self._is_there = False

    def on_upload(self, run, uploaded):
        self._is_there = uploaded.error is None

    def on_step(self, run, step):
        if self._is_there and run.step % 6 == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def fit_and_die(settings: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with quick_lease():
        Trainer(check("tiny", [*SETTINGS, *settings]), [DieAfterAnUpload()]).fit()


def fit_there(settings: list[str], environment: dict[str, str]) -> tuple:
    os.environ.update(environment)
    return fit(settings)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_was_killed_and_lost_its_disk_ends_as_the_untouched_one(tmp_path, environment, world_size):
    whole, run = tmp_path / "whole" / "r", tmp_path / "r"
    settings = [f"run_dir={run}", f"checkpoint.remote=s3://{environment['BUCKET']}/runs/r", "resume=auto"]
    ranks(world_size).run(fit, [f"run_dir={whole}"])
    with pytest.raises(AssertionError, match="it died"):
        Mortal(world_size).run(fit_and_die, settings, environment)
    wipe(run)
    ((said, *_), *_) = ranks(world_size).run(fit_there, settings, environment)
    assert "resume: fetched s3://bucket-" in said and "resuming after step " in said
    require_equal(run, whole)


def test_a_bucket_that_is_missing_is_refused_at_the_start(environment):
    (problem,) = early_remote_problems(recipe("s3://absent/r"))
    assert problem.startswith("checkpoint.remote: s3://absent/r cannot be used (FileNotFoundError:")
    assert "create the bucket" in problem
    assert early_remote_problems(recipe(f"s3://{environment['BUCKET']}/r")) == []

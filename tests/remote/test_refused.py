"""What a start refuses before anything exists."""

import shutil
import sys
from pathlib import Path

import pytest
from fsspec.registry import known_implementations

from relora_ds.config import load_recipe
from relora_ds.config.errors import RecipeError
from relora_ds.remote.place import Place
from relora_ds.training.remote_rules import early_remote_problems
from tests.remote import stores

KEYLESS = "s3://key:secret@bucket/prefix"


def recipe(remote: object, *overrides: str):
    return load_recipe("tiny", [f"checkpoint.remote={remote}", *overrides])


@pytest.fixture
def faults():
    yield stores.FAULTS
    stores.FAULTS.clear()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("bucket/prefix", "checkpoint.remote: bucket/prefix is no URL; use e.g. s3://bucket/runs/mine"),
        ("s3://", "checkpoint.remote: s3:// names no bucket or directory; use e.g. s3://bucket/runs/mine"),
        (KEYLESS, "checkpoint.remote: the URL of s3:// holds a key or a password, which recipe.yaml"),
    ],
)
def test_an_url_that_is_none_or_tells_a_secret(url, message):
    with pytest.raises(RecipeError) as caught:
        recipe(url)
    (problem,) = caught.value.problems
    assert problem.startswith(message) and "secret" not in problem


def test_a_protocol_that_is_unknown_or_not_installed(monkeypatch):
    (problem,) = early_remote_problems(recipe("nope://bucket/x"))
    assert problem.startswith("checkpoint.remote: nope://bucket/x cannot be used (Protocol not known: nope)")
    monkeypatch.setitem(known_implementations, "gone", {"class": "gonefs.GoneFS", "err": "no"})
    with monkeypatch.context() as gone:
        gone.setitem(sys.modules, "gonefs", None)
        (problem,) = early_remote_problems(recipe("gone://bucket/x"))
    assert problem == (
        "checkpoint.remote: gone://bucket/x needs a package for gone://, which is not installed; pip install gonefs"
    )


@pytest.mark.parametrize("operation", ["put", "find", "read"])
def test_a_store_that_refuses_at_the_start(tmp_path, faults, operation):
    faults.append(stores.fails(operation, ""))
    url = stores.url(tmp_path / "store")
    (problem,) = early_remote_problems(recipe(url))
    assert problem.startswith(f"checkpoint.remote: {url} cannot be used (PermissionError: Access Denied")
    assert problem.endswith("create the bucket, or correct the URL, or the credentials in the environment")


def test_the_probe_leaves_nothing(tmp_path):
    assert early_remote_problems(recipe(stores.url(tmp_path / "store"))) == []
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_run_that_is_there(tmp_path):
    url = stores.url(tmp_path / "store")
    Place(url).write("recipe.yaml", b"run_dir: /elsewhere/mine\n")
    mine, other = f"run_dir={tmp_path}/mine", f"run_dir={tmp_path}/yours"
    (problem,) = early_remote_problems(recipe(url, mine))
    assert "holds a run already; set resume=auto to continue it, overwrite=true to delete it" in problem
    assert early_remote_problems(recipe(url, mine, "resume=auto")) == []
    assert early_remote_problems(recipe(url, mine, "overwrite=true")) == []
    for how in ("resume=auto", "overwrite=true"):
        (problem,) = early_remote_problems(recipe(url, other, how))
        assert "holds the run of run_dir /elsewhere/mine, and this one's is" in problem
        assert problem.endswith("or a run_dir named mine to continue that run")
    shutil.rmtree(Path(tmp_path, "store"))
    assert early_remote_problems(recipe(url, other)) == []

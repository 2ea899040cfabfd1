"""A finished run, and starts that are refused."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from relora_ds.train import main
from tests.training.run_directories import OURS, SETTINGS, snapshot
from tests.training.runs import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run; to be copied, not changed."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(directory, *SETTINGS, world_size=1)
    assert {path.name for path in directory.iterdir()} == OURS
    return directory


@pytest.fixture
def a_run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refused(capfd):
    """Start train.py; assert that it is refused before anything exists, and that `untouched` stays as it is."""

    def start(untouched: Path, *overrides: str, config: str = "tiny", code: int = 2) -> str:
        before = snapshot(untouched)
        assert main(["--config", config, *SETTINGS, *overrides]) == code
        assert snapshot(untouched) == before and not dist.is_initialized()
        return capfd.readouterr().err

    return start

"""Nothing that is loaded can run code: a pickle in the place of each file is refused, and not opened as one."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from relora_ds.checkpoint import manifest, store
from relora_ds.interop.sources import model_of
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from relora_ds.utils.files import sha256
from tests.checkpoint.weights import weights_in
from tests.ranks import ranks
from tests.training.runs import run

SETTINGS = ("train.steps=14", "checkpoint.every=12", "checkpoint.keep_last=99", "eval.samples=0")


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run(directory, *SETTINGS)
    return directory


def believe(checkpoint: Path) -> None:
    """Write a manifest that agrees with what is in the directory, as somebody would who means harm."""
    path = checkpoint / manifest.NAME
    content = json.loads(path.read_text())
    for name, about in content["files"].items():
        about.update(size=(checkpoint / name).stat().st_size, sha256=sha256(checkpoint / name))
    del content["sha256"]
    path.write_text(json.dumps({"sha256": manifest._digest(content), **content}))


def resume(run_dir: str, checkpoint: str) -> str:
    try:
        Trainer(check("tiny", [f"run_dir={run_dir}", f"resume={checkpoint}", *SETTINGS])).fit()
    except Exception as error:  # what it is, is not the point
        return f"{type(error).__name__}: {error}"
    return ""


def test_every_file_of_a_checkpoint(whole, tmp_path):
    evil, pickled = tmp_path / "evil", tmp_path / "pickle"
    torch.save({"weights": torch.zeros(2), "evil": Evil(evil)}, pickled)
    names = [path.name for path in (whole / "checkpoints" / "step_00000012").iterdir()]
    assert "trained_00001.safetensors" in names and "config.json" in names
    for name in names:
        for trusted in [False, True] if name != manifest.NAME else [False]:
            copy = shutil.copytree(whole, tmp_path / f"{name}{trusted}") / "checkpoints" / "step_00000012"
            shutil.copy(pickled, copy / name)
            if trusted:
                believe(copy)
            refused = all(ranks(2).run(resume, str(tmp_path / "new" / copy.parent.parent.name), str(copy)))
            assert refused or name.endswith("config.json")  # which a resume does not read
            by_its_name = not trusted and name.endswith("config.json")  # the manifest has what the file said
            with nullcontext() if by_its_name else pytest.raises((ValueError, OSError)):
                model_of(str(copy))
            assert not evil.exists()
    with pytest.raises(AssertionError):  # the pickle does what it should
        torch.load(pickled, weights_only=False)
        assert not evil.exists()


def test_export_reads_what_the_manifest_says(whole, tmp_path):
    copy = shutil.copytree(whole / "checkpoints" / "step_00000012", tmp_path / "c")
    path = copy / "frozen_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="frozen_00000.safetensors is not what was written"):
        weights_in(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_to_begin_with(whole, tmp_path, name):
    evil, model = tmp_path / "evil", shutil.copytree(whole / "export", tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"evil": Evil(evil)}, model / name)
    with pytest.raises(ValueError, match="^source: .*(could run code|cannot be loaded)"):
        model_of(str(model))
    assert not evil.exists()


def test_remote_code_is_said_loudly(tmp_path):
    plan = check("tiny", [f"run_dir={tmp_path / 'r'}", "trust_remote_code=true"])
    assert any(warning.startswith("trust_remote_code: true") for warning in plan.warnings())
    assert store.directories(tmp_path / "r") == []

"""`python -m relora_ds checkpoint list|verify|prune RUN`."""

import shutil

import pytest

from relora_ds.__main__ import main
from tests.training.runs import run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "r"
    run(directory, "train.steps=24", "checkpoint.every=4", "checkpoint.keep_last=99", "eval.samples=0")
    return directory


@pytest.fixture
def copy(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "r")


def steps(directory) -> list[int]:
    return sorted(int(path.name[5:]) for path in (directory / "checkpoints").glob("step_*"))


def test_list(run_dir, capsys):
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["checkpoint", "phase", "restarts", "ranks", "engine", "bytes", "written"]
    assert [row[0] for row in rows] == [f"step_{step:08d}" for step in (4, 8, 12, 16, 20, 24)]
    assert rows[0][1:6] == ["warm_start", "0", "2", "zero1", "fp32"]
    assert rows[-1][1:6] == ["relora", "1", "2", "zero1", "fp32"]


def test_list_names_one_that_cannot_be_read(copy, capsys):
    (copy / "checkpoints" / "step_00000008" / "manifest.json").write_text("{")
    assert main(["checkpoint", "list", str(copy)]) == 0
    assert "step_00000008: " in (printed := capsys.readouterr().out) and "manifest.json cannot be read" in printed


def test_verify(copy, capsys):
    assert main(["checkpoint", "verify", str(copy)]) == 0
    assert capsys.readouterr().out.count(": intact\n") == 6
    path = copy / "checkpoints" / "step_00000012" / "trained_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert main(["checkpoint", "verify", str(copy)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(": intact") for line in printed) == 5
    assert f"step_00000012: {path} is not what was written (its sha256 differs)" in printed
    assert main(["checkpoint", "verify", str(path.parent)]) == 1


def test_prune(copy, capsys):
    assert main(["checkpoint", "prune", str(copy), "--keep-last", "2", "--keep-every", "12"]) == 0
    assert capsys.readouterr().out == "deleted step_00000004\ndeleted step_00000008\ndeleted step_00000016\n"
    assert steps(copy) == [12, 20, 24]
    assert main(["checkpoint", "verify", str(copy)]) == 0
    assert main(["checkpoint", "prune", str(copy), "--keep-last", "99"]) == 0
    assert capsys.readouterr().out.endswith("nothing to delete\n")


def test_prune_does_not_count_what_is_damaged_or_a_copy(copy, capsys):
    directory = copy / "checkpoints"
    (directory / "step_00000024" / "manifest.json").unlink()
    shutil.copytree(directory / "step_00000020", directory / "step_00000020.bak")
    assert main(["checkpoint", "prune", str(copy), "--keep-last", "1"]) == 0
    assert sorted(path.name for path in directory.glob("step_*")) == ["step_00000020", "step_00000020.bak"]
    capsys.readouterr()
    (directory / "step_00000020" / "trained_00000.safetensors").write_bytes(b"short")
    assert main(["checkpoint", "prune", str(copy), "--keep-last", "1"]) == 1
    assert "no checkpoint is intact, and none is deleted" in capsys.readouterr().err
    assert (directory / "step_00000020").is_dir()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "RUN"], "--keep-last: None would leave no checkpoint"),
        (["prune", "RUN", "--keep-last", "0"], "--keep-last: 0 would leave no checkpoint"),
        (["prune", "RUN", "--keep-last", "1", "--keep-every", "0"], "--keep-every: 0 is not a number of steps"),
        (["prune", "RUN/checkpoints/step_00000008", "--keep-last", "1"], "is a checkpoint; name the run"),
        (["list", "RUN/nowhere"], "it has no checkpoint"),
    ],
)
def test_what_makes_no_sense(copy, capsys, arguments, said):
    assert main(["checkpoint", *(argument.replace("RUN", str(copy)) for argument in arguments)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and said in printed and printed.count("\n") == 1
    assert steps(copy) == [4, 8, 12, 16, 20, 24]

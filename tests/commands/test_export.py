"""`python -m relora_ds export`, as a user types it."""

import pytest
from transformers import AutoModelForCausalLM

from relora_ds.__main__ import main
from tests.training.runs import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "finished"
    run(directory, "checkpoint.every=7", "checkpoint.keep_last=9", "train.steps=16")
    return directory


def test_it_says_what_it_wrote(finished, tmp_path, capsys):
    assert main(["export", str(finished), str(tmp_path / "a"), "--dtype", "bf16"]) == 0
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'a'}: {finished} in bf16; load it with AutoModelForCausalLM.from_pretrained\n"
    )
    assert main(["export", str(finished), str(tmp_path / "b"), "--checkpoint", "step_00000007"]) == 0
    assert "checkpoints/step_00000007 in fp32" in capsys.readouterr().out
    assert main(["export", str(finished), str(tmp_path / "c"), "--format", "peft"]) == 0
    assert "PeftModel.from_pretrained, its base is in base/" in capsys.readouterr().out
    for directory in (tmp_path / "a", tmp_path / "b", tmp_path / "c" / "base"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_mistakes_are_one_line(finished, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "none"), str(tmp_path / "out")], "neither a run of relora_ds nor a checkpoint"),
        ([str(finished), str(finished)], "exists and is not empty"),
        ([str(finished), str(tmp_path / "out"), "--checkpoint", "latest"], "there are step_0000000"),
        (
            [str(finished), str(tmp_path / "out"), "--format", "peft", "--checkpoint", "step_00000007"],
            "the checkpoint has no adapter",
        ),
    ):
        assert main(["export", *arguments]) == 1
        printed = capsys.readouterr().err
        assert message in printed and printed.startswith("error: ") and printed.count("\n") == 1
    with pytest.raises(SystemExit) as error:
        main(["export", str(finished), str(tmp_path / "out"), "--dtype", "fp8"])
    assert error.value.code == 2 and "fp8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

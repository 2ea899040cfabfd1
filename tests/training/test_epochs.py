"""A run says how often it reads its corpus, and `check` as far as that is known."""

import pytest

from relora_ds.__main__ import main
from relora_ds.data import file_hashes
from relora_ds.training import preflight
from relora_ds.training.hooks.console import opening
from relora_ds.training.phases import phases_of
from tests.data.settings import write_text


@pytest.fixture
def overrides(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "GRANULARITY_NS", -10_000_000_000)  # as if the text had lain here for long
    for number in range(30):
        write_text(tmp_path / "text" / f"{number:02}.txt", 40, f"word{number}")
    return [
        f"run_dir={tmp_path / 'run'}",
        "data.source=text",
        f"data.path={tmp_path / 'text'}",
        "data.vocab_size=360",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.seq_len=32",
        "train.steps=200",
        "train.batch_sequences=8",
        "train.micro_batch_size=8",
    ]


def checked(capsys, overrides, *more):
    assert main(["check", "tiny", *overrides, *more]) == 0
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_run_and_check_say_the_epochs(overrides, capsys, packing):
    overrides = [*overrides, f"data.packing={packing}"]
    assert "epochs: exactly known after the corpus is tokenized" in checked(capsys, overrides)
    plan = preflight.check("tiny", overrides)
    rows = len(plan.data.train) // 32 if packing == "true" else 29
    line = f"epochs: {1600 / rows:.2f} (1,600 sequences of a corpus of {rows:,})"
    assert line in opening(plan, phases_of(plan.recipe), None)
    assert not any("max_tokens" in warning for warning in plan.warnings())
    assert line in checked(capsys, overrides)


def test_a_corpus_that_is_shorter_than_max_tokens_is_said(overrides, capsys):
    overrides = [*overrides, "data.max_tokens=40000"]
    assert "epochs: at least 1.28; exactly known after" in checked(capsys, overrides)
    plan = preflight.check("tiny", overrides)
    rows = len(plan.data.train) // 32
    warning = (
        f"data.max_tokens: 40000 is more than the {len(plan.data.train)} training tokens of the corpus; the run "
        f"reads it {1600 / rows:.2f} times; use a larger corpus, or remove it"
    )
    assert warning in plan.warnings() and f"WARNING: {warning}" in checked(capsys, overrides)
    plan = preflight.check("tiny", [*overrides, "data.max_tokens=4000"])
    assert len(plan.data.train) == 4000 and not any("max_tokens" in warning for warning in plan.warnings())


def test_check_does_not_read_a_corpus_to_hash_it(overrides, capsys, tmp_path):
    preflight.check("tiny", overrides)
    (tmp_path / "text" / "new.txt").write_text("more")
    assert "epochs: exactly known after the corpus is tokenized" in checked(capsys, overrides)

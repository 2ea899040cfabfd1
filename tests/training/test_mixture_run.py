"""A run on a mixture: what it says, its losses by name, and a resume on another number of ranks."""

import json
import shutil

import pytest

from relora_ds.__main__ import main
from relora_ds.data import file_hashes
from relora_ds.training import preflight
from relora_ds.training.hooks.console import opening
from relora_ds.training.phases import phases_of
from tests.data.settings import write_text
from tests.training.runs import lines, losses, run


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture")
    for name, number in (("hills", 30), ("seas", 12)):
        for file in range(number):
            write_text(directory / name / f"{file:02}.txt", 30, f"{name}{file}")
    write_text(directory / "lakes.txt", 60, "lake")
    items = [f"{{path: {directory / name}, weight: {weight}}}" for name, weight in (("hills", 0.75), ("seas", 0.25))]
    return [
        f"data.mix=[{', '.join(items)}]",
        f"data.validation_sets=[{{path: {directory / 'lakes.txt'}}}]",
        "data.vocab_size=360",
        "data.seq_len=32",
        "train.steps=16",
        "train.batch_sequences=4",
        "train.micro_batch_size=2",
        "method=full",
        "checkpoint.every=8",
        "eval.every=8",
        "checkpoint.keep_last=9",
    ]


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "mixed"
    return directory, run(directory, *settings)


def test_the_loss_of_a_mixture_is_that_of_all_its_corpora_and_each_has_its_own(finished, settings):
    directory, summary = finished
    data = preflight.check("tiny", settings).data
    tokens = {part.name: len(part.data.validation) - 1 for part in data.parts}
    total = sum(summary[f"val_loss/{name}"] * count for name, count in tokens.items())
    assert summary["val_tokens"] == sum(tokens.values())
    assert summary["val_loss"] == pytest.approx(total / summary["val_tokens"], rel=1e-12)
    assert summary["val_loss/lakes"] > summary["val_loss"]  # words that no corpus has
    evaluations = lines(directory, "eval")
    assert [line["step"] for line in evaluations] == [8, 16]
    assert evaluations[-1]["val_loss/seas"] == summary["val_loss/seas"]


def test_a_run_says_what_it_reads_of_each_corpus(settings, capsys, monkeypatch):
    monkeypatch.setattr(file_hashes, "GRANULARITY_NS", -10_000_000_000)  # as if the files had lain here for long
    plan = preflight.check("tiny", settings)
    rows = [extent.sequences for extent in plan.extents]
    said = opening(plan, phases_of(plan.recipe), None)
    assert "on 0.75 hills + 0.25 seas, method full" in said[0]
    expected = [
        f"epochs of hills: {48 / rows[0]:.2f} (48 of 64 sequences, of a corpus of {rows[0]:,})",
        f"epochs of seas: {16 / rows[1]:.2f} (16 of 64 sequences, of a corpus of {rows[1]:,})",
    ]
    assert said[2:4] == expected
    assert main(["check", "tiny", *settings]) == 0
    out = capsys.readouterr().out
    assert all(line in out for line in expected)


def test_a_resume_on_another_number_of_ranks_takes_the_same_batches(finished, settings, tmp_path):
    directory, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    run(copy, *settings, f"resume={copy / 'checkpoints' / 'step_00000008'}", world_size=1)
    assert losses(copy) == pytest.approx(losses(directory), rel=1e-5)
    (manifest,) = (copy / "checkpoints" / "step_00000016").glob("manifest.json")
    assert json.loads(manifest.read_text())["run"]["loader"] == {"taken": [48, 16]}


def test_a_mixture_is_prepared_as_directories_that_train_the_same(settings, tmp_path, capsys):
    assert main(["prepare", "--config", "tiny", str(tmp_path / "out"), *settings]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'hills'}: " in said and f"{tmp_path / 'out' / 'seas'}: " in said
    override = said.splitlines()[-1].partition(": ")[2].strip("'")
    copied = preflight.check("tiny", [*settings, override])
    assert copied.data.fingerprint == preflight.check("tiny", settings).data.fingerprint


def test_a_mixture_is_evaluated_in_the_ids_of_any_model(finished, settings, tmp_path, capsys):
    directory, summary = finished
    capsys.readouterr()
    assert main(["eval", str(directory), "--json", "--data", str(directory)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert found["val_loss/seas"] == pytest.approx(summary["val_loss/seas"], rel=1e-6)

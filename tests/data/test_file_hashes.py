"""Hashes are remembered while a file is unchanged, and never when it may have changed."""

import hashlib
import os

import pytest

from relora_ds.data import file_hashes


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read, by name."""
    read = []
    real = file_hashes.sha256
    monkeypatch.setattr(file_hashes, "sha256", lambda name: read.append(os.path.basename(name)) or real(name))
    return read


@pytest.fixture
def files(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name * 10)
    return [tmp_path / name for name in "abc"]


def expected(files):
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_an_unchanged_file_is_read_once(tmp_path, files, hashed, monkeypatch):
    monkeypatch.setattr(file_hashes, "GRANULARITY_NS", -10_000_000_000)  # as if the files had lain here for long
    for _ in range(3):
        assert file_hashes.sha256_of(files, tmp_path / "cache") == expected(files)
    assert sorted(hashed) == ["a", "b", "c"]


def test_a_changed_file_is_read_again_also_when_its_size_and_mtime_are_put_back(tmp_path, files, hashed, monkeypatch):
    monkeypatch.setattr(file_hashes, "GRANULARITY_NS", -10_000_000_000)
    before = file_hashes.sha256_of(files, tmp_path / "cache")
    stat = files[1].stat()
    while files[1].stat().st_ctime_ns == stat.st_ctime_ns:  # the kernel's clock may tick every 4 ms only
        files[1].write_text("B" * 10)
        os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (files[1].stat().st_size, files[1].stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = file_hashes.sha256_of(files, tmp_path / "cache")
    assert after == expected(files) and after[1] != before[1]
    assert sorted(hashed) == ["a", "b", "b", "c"]


def test_a_file_that_was_just_written_is_not_trusted(tmp_path, files, hashed, monkeypatch):
    """A second write within the clock's granularity would leave the same times."""
    monkeypatch.setattr(file_hashes, "GRANULARITY_NS", 10**12)  # as if no time had passed
    for _ in range(2):
        file_hashes.sha256_of(files, tmp_path / "cache")
    assert len(hashed) == 6


def test_a_broken_manifest_is_forgotten(tmp_path, files):
    file_hashes.sha256_of(files, tmp_path / "cache")
    (written,) = (tmp_path / "cache" / "manifests").glob("*.json")
    written.write_text("{")
    assert file_hashes.sha256_of(files, tmp_path / "cache") == expected(files)


def test_a_name_that_is_not_utf_8(tmp_path):
    file = tmp_path / os.fsdecode(b"\xff.txt")
    file.write_text("text")
    assert file_hashes.sha256_of([file], tmp_path / "cache") == expected([file])

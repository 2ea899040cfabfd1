"""Files are replaced whole, or not at all."""

import errno
import hashlib
import os

import pytest

from relora_ds.utils.files import sha256, write_text


def test_what_fails_while_a_file_is_replaced_leaves_it_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "before"


def test_a_sum_is_that_of_the_contents(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 3_000_000)
    with open(path, "rb") as file:
        assert sha256(path) == sha256(str(path)) == sha256(file) == hashlib.sha256(path.read_bytes()).hexdigest()

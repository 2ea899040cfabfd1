"""A damaged cache is noticed: it is made again, or refused where there is nothing to make it from."""

import errno
import fcntl
import gzip
import json
import os
import shutil

import numpy as np
import pytest

from relora_ds.data import cache, file_hashes, gutenberg, preparation, prepare, pretokenized, tokenization, wikitext
from relora_ds.data import tokenizer as tokenizers
from tests.data.settings import settings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The cache of one small corpus."""
    root = tmp_path_factory.mktemp("cache")
    prepare(settings(root, seq_len=16))
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch):
    calls, build = [], preparation._build
    monkeypatch.setattr(preparation, "_build", lambda *arguments: calls.append(1) or build(*arguments))
    return calls


def change(file, content):
    """Other contents of the same length, with the time of the last change put back."""
    before, stat = file.read_bytes(), file.stat()
    file.write_bytes(content(before))
    assert file.stat().st_size == len(before) and file.read_bytes() != before
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGES = {
    "train.bin": lambda b: bytes(2000) + b[2000:],
    "validation.bin": lambda b: b[::-1],
    "tokenizer/tokenizer.model": lambda b: b[:-5] + bytes(5),
    "tokenizer/tokenizer_config.json": lambda b: b.replace(b"false", b"true ", 1),
    "metadata.json": lambda b: b.replace(b'"pad_id": 3', b'"pad_id": 2'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_made_again(root, builds, name):
    first = prepare(settings(root, seq_len=16))
    tokens = np.array(first.train)
    change(first.directory / name, DAMAGES[name])
    with pytest.warns(UserWarning, match=rf"data.cache_dir: '?.*{name}'? is damaged.*; the corpus is tokenized again"):
        again = prepare(settings(root, seq_len=16))
    assert builds == [1] and again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.train, tokens)
    prepare(settings(root, seq_len=16))
    assert builds == [1]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_of_tokens_is_refused(root, tmp_path, name):
    prepared = prepare(settings(root, seq_len=16))
    pretokenized.write(prepared.directory, tokenizers.load(prepared.tokenizer_dir), tmp_path / "tokens")
    data = settings(root, source="pretokenized", path=str(tmp_path / "tokens"), seq_len=16)
    assert prepare(data).fingerprint == prepared.fingerprint
    change(tmp_path / "tokens" / name, DAMAGES[name])
    with pytest.raises(ValueError, match=rf"data.path: '?.*{name}'? is damaged.*; copy the directory again"):
        prepare(data)


def test_what_was_verified_is_not_read_again(root, monkeypatch):
    monkeypatch.setattr(file_hashes, "GRANULARITY_NS", -10_000_000_000)  # as if the files had lain here for long
    prepare(settings(root, seq_len=16))
    monkeypatch.setattr(file_hashes, "sha256", lambda name: pytest.fail(f"{name} was read"))
    prepare(settings(root, seq_len=16))


def test_damage_of_what_is_remembered_damages_nothing(root, builds, monkeypatch):
    monkeypatch.setattr(file_hashes, "GRANULARITY_NS", -10_000_000_000)
    prepare(settings(root, seq_len=16))
    for file in (root / "manifests").glob("*.json"):
        known = json.loads(file.read_text())
        file.write_text(json.dumps({name: [state, "0" * 64] for name, (state, _) in known.items()}))
    prepare(settings(root, seq_len=16))
    for text in ("null", "[]", '{"a": 1}', "{"):
        for file in (root / "manifests").glob("*.json"):
            file.write_text(text)
        prepare(settings(root, seq_len=16))
    assert builds == []


def test_an_entry_without_checksums_is_used_as_before(root, builds):
    """Caches of earlier versions hold the hashes of the tokens only."""
    first = prepare(settings(root, seq_len=16))
    metadata = json.loads((first.directory / "metadata.json").read_text())
    del metadata["checksum"], metadata["tokenizer_sha256"]
    (first.directory / "metadata.json").write_text(json.dumps(metadata))
    assert prepare(settings(root, seq_len=16)).fingerprint == first.fingerprint and builds == []


def test_a_cache_that_cannot_be_written_is_used_and_read_once(root, builds, monkeypatch, tmp_path):
    monkeypatch.setattr(file_hashes, "GRANULARITY_NS", -10_000_000_000)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))
    first = prepare(settings(root, seq_len=16))
    shutil.rmtree(root / "manifests")
    (root / "manifests").write_text("")  # no directory can be made here, not even by root
    (tmp_path / "elsewhere").write_text("")
    assert prepare(settings(root, seq_len=16)).fingerprint == first.fingerprint
    (tmp_path / "elsewhere").unlink()
    assert prepare(settings(root, seq_len=16)).fingerprint == first.fingerprint
    monkeypatch.setattr(file_hashes, "sha256", lambda name: pytest.fail(f"{name} was read"))
    assert prepare(settings(root, seq_len=16)).fingerprint == first.fingerprint and builds == []


def test_a_file_that_cannot_be_read_now_is_not_deleted(root, monkeypatch):
    first = prepare(settings(root, seq_len=16))

    def unreadable(name):
        raise OSError(errno.EIO, "Input/output error", str(name))

    monkeypatch.setattr(file_hashes, "sha256", unreadable)
    change(first.directory / "train.bin", DAMAGES["train.bin"])
    with pytest.raises(ValueError, match=r"data.cache_dir: '.*' cannot be read \(Input/output error\); make it readab"):
        prepare(settings(root, seq_len=16))
    assert (first.directory / "train.bin").is_file()


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    """Processes of the host take turns by a lock elsewhere."""
    real, elsewhere = fcntl.flock, tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(elsewhere))

    def flock(descriptor, operation):
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(elsewhere)):
            raise OSError(code, os.strerror(code))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with cache.locked(tmp_path / "disk" / "entry"):
        (lock,) = elsewhere.glob("*/*.lock")
        with open(lock) as other, pytest.raises(BlockingIOError):
            real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_books_and_articles_that_are_damaged_are_named(tmp_path):
    (tmp_path / "emma.txt").write_text("Emma Woodhouse")
    (tmp_path / "NOTICE").write_text(f"Books\n{'0' * 64}  emma.txt\n")
    with pytest.raises(ValueError, match="data.source: '.*emma.txt' is damaged; delete its directory and run again"):
        gutenberg.books(tmp_path)
    (tmp_path / "train.raw.gz").write_bytes(gzip.compress(b"text" * 999)[:-9])
    with pytest.raises(ValueError, match="data.source: '.*train.raw.gz' is damaged .*; delete its directory and run"):
        wikitext.read(tmp_path, "train")


@pytest.mark.parametrize("what", ["a file", "a link to nothing", "a link to an incomplete entry"])
def test_something_else_under_an_entrys_name_is_replaced(root, tmp_path, what):
    first = prepare(settings(root, seq_len=16))
    shutil.move(first.directory, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "train.bin").write_bytes(b"")
    if what == "a file":
        first.directory.write_text("")
    else:
        first.directory.symlink_to(tmp_path / ("elsewhere" if "incomplete" in what else "nothing"))
    assert prepare(settings(root, seq_len=16)).fingerprint == first.fingerprint
    assert (tmp_path / "elsewhere" / "train.bin").is_file()


UNFINISHED = {
    "train.bin": lambda b: b[:-20],
    "train.bin zeroed": lambda b: bytes(200) + b[200:],
    "tokenizer/tokenizer.model": lambda b: b[:-5] + bytes(5),
    "progress.json": lambda b: b.replace(b'"words": ', b'"words": 1'),
    "progress.json type": lambda b: b.replace(b'"tokens": ', b'"tokens": 1e'),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_damaged_beginning_is_not_gone_on_from(tmp_path, monkeypatch, name):
    expected = prepare(settings(tmp_path / "whole", seq_len=16))
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "PIECE_CHARACTERS", 1)
        write, calls = tokenization.Progress.commit, []

        def stop(progress, directory):
            write(progress, directory)
            if len(calls) == 1:
                raise OSError(errno.EIO, "stopped")
            calls.append(progress)

        patch.setattr(tokenization.Progress, "commit", stop)
        with pytest.raises(OSError, match="stopped"):
            prepare(settings(tmp_path / "cache", seq_len=16))
    [partial] = (tmp_path / "cache" / "tokens").glob(".*.partial")
    file = partial / name.split()[0]
    file.write_bytes(UNFINISHED[name](file.read_bytes()))
    found = prepare(settings(tmp_path / "cache", seq_len=16))
    assert found.fingerprint == expected.fingerprint and found.validation_words == expected.validation_words

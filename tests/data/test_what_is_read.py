"""Of a directory only the corpus is read, what is left out is said, and validation text is never training text."""

import gzip
import json
import os
import warnings

import pyarrow
import pyarrow.parquet
import pytest

from relora_ds.data import corpora, documents, hub, localfiles, prepare, problems
from relora_ds.data.reading import DataWarning
from tests.data.settings import settings, write_text

ROWS = [f"document {number} over the hill" for number in range(40)]


def write_jsonl(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def splits(tmp_path, **changes):
    data = settings(tmp_path / "cache", source="text", **changes)
    return [list(documents(data, split)) for split in ("train", "validation")]


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        yield


def test_hidden_files_and_folders_are_not_read(tmp_path, no_warnings):
    corpus = tmp_path / ".corpora" / "mine"  # a hidden place that is named is meant
    write_jsonl(corpus / "a.jsonl")
    for hidden in ("._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", ".git/x.txt", "sub/.b.txt", ".d/e/f.txt"):
        write_jsonl(corpus / hidden)
    train, validation = splits(tmp_path, path=str(corpus), validation=0.1)
    assert len(train) + len(validation) == 40 and not set(train) & set(validation)
    assert localfiles.find(corpus / ".d" / "e" / "f.txt", "data.path") == [corpus / ".d" / "e" / "f.txt"]
    assert len(localfiles.find(f"{corpus}/.git/*", "data.path")) == 1


@pytest.mark.parametrize("name", ["b.jsonl.zst", "c.txt.gz", "d.csv", "e.md", "sub/f.xml", "g.txt~", "h"])
def test_files_that_are_left_out_are_named(tmp_path, name):
    write_jsonl(tmp_path / "corpus" / "a.jsonl")
    (tmp_path / "corpus" / "sub").mkdir()
    (tmp_path / "corpus" / name).write_bytes(b"...")
    with pytest.warns(DataWarning, match=rf"data.path: of the directory '.*corpus' only .* and not: {name}; convert"):
        assert len(localfiles.find(tmp_path / "corpus", "data.path")) == 1


def test_of_many_files_that_are_left_out_the_endings_are_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    for number in range(30):
        (tmp_path / f"{number:02}.{'md' if number % 3 else 'csv'}").write_text("x")
    with pytest.warns(DataWarning, match=r"and not: 00.csv, 01.md, .*07.md, 15 more .md, 7 more .csv; convert"):
        localfiles.find(tmp_path, "data.path")


def test_links_out_of_the_directory_are_named(tmp_path):
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl")
    write_jsonl(tmp_path / "corpus" / "a.jsonl")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "gone.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.warns(DataWarning, match="and not: gone.jsonl, linked; convert"):
        assert len(localfiles.find(tmp_path / "corpus", "data.path")) == 1


def test_a_directory_without_text_says_what_is_there(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    (tmp_path / ".b.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no .txt, .* file \(not read: a.txt.zst\); give a glob"):
        localfiles.find(tmp_path, "data.path")
    with pytest.raises(ValueError, match=r"a.txt.zst' is neither plain text nor .*; decompress it"):
        localfiles.find(tmp_path / "*.zst", "data.path")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "corpus" / "sub" / "a.jsonl")
    write_jsonl(tmp_path / "corpus" / "a.jsonl")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"data.path: '.*sub' cannot be read \(Permission denied\); make it readable"):
        localfiles.find(tmp_path / "corpus", "data.path")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json.gz", "a.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / name).mkdir()  # not even root can read it
    with pytest.raises(ValueError, match=rf"data.path: '.*{name}' cannot be read"):
        list(localfiles.read(tmp_path / name, "text"))


# -- validation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_validation_text_is_not_trained_on_under_another_name(tmp_path, link, no_warnings):
    write_jsonl(tmp_path / "corpus" / "a.jsonl")
    held_out = write_jsonl(tmp_path / "corpus" / "valid.jsonl", ["held out"])
    link(held_out, tmp_path / "corpus" / "another.jsonl")
    for validation in (held_out, tmp_path / "corpus" / "another.jsonl", f"{tmp_path}/corpus/val*"):
        assert splits(tmp_path, path=str(tmp_path / "corpus"), validation=str(validation)) == [ROWS, ["held out"]]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_with_two_names_is_read_once(tmp_path, link, no_warnings):
    link(write_jsonl(tmp_path / "corpus" / "a.jsonl"), tmp_path / "corpus" / "b.jsonl")
    train, validation = splits(tmp_path, path=str(tmp_path / "corpus"), validation=0.1)
    assert len(train) + len(validation) == 40


def test_copies_of_validation_text_are_not_trained_on(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl")
    held_out = write_jsonl(tmp_path / "valid.jsonl", ["held out"])
    write_jsonl(tmp_path / "corpus" / "copy.jsonl", ["held out"])
    with pytest.warns(DataWarning, match="copy.jsonl: the same contents as a validation file; not read"):
        assert splits(tmp_path, path=str(tmp_path / "corpus"), validation=str(held_out)) == [ROWS, ["held out"]]
    with pytest.warns(DataWarning, match="all training text is validation text"):
        splits(tmp_path, path=str(tmp_path / "corpus" / "copy.jsonl"), validation=str(held_out))


def test_a_fraction_of_copied_files_is_held_out_of_all_copies(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl")
    write_jsonl(tmp_path / "corpus" / "a - Copy.jsonl")
    with pytest.warns(DataWarning, match="a.jsonl: the same contents as another file, part of which is held out"):
        train, validation = splits(tmp_path, path=str(tmp_path / "corpus"), validation=0.1)
    assert len(train) == 36 and not set(train) & set(validation)


def test_shards_of_c4_that_are_held_out_are_not_trained_on(tmp_path):
    for number in range(2):
        (tmp_path / f"c4-train.0000{number}-of-00002.json.gz").write_bytes(
            gzip.compress(b"".join(json.dumps({"text": f"{number} {row}"}).encode() + b"\n" for row in ROWS))
        )
    data = settings(
        tmp_path / "cache",
        source="c4",
        path=str(tmp_path),
        max_tokens=1000,
        validation=str(tmp_path / "c4-train.00001-of-00002.json.gz"),
    )
    assert problems(data) == []
    assert {text[0] for text in documents(data, "train")} == {"0"}


def test_a_local_corpus_of_datasets_that_trains_on_its_validation_file_is_refused(tmp_path):
    held_out = write_jsonl(tmp_path / "corpus" / "a.jsonl")
    write_jsonl(tmp_path / "corpus" / "b.jsonl", ROWS[:20])
    data = settings(tmp_path / "cache", source=str(tmp_path / "corpus"), validation=str(held_out))
    with pytest.raises(ValueError, match=r"data.validation: '.*a.jsonl' is also training text of data.source"):
        corpora.open_corpus(data).open()


# -- encodings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16le", "utf-16be", "utf-32", "utf-32le", "utf-32be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_the_advice_for_other_encodings_is_right(tmp_path, name, encoding):
    content = "".join(f'{{"text": "{row}"}}\n' for row in ROWS).encode(encoding)
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=rf"{name}'.* is not UTF-8 .*; convert it with iconv -f {encoding} -t utf-8$"):
        list(localfiles.read(file, "text"))


def test_utf_16_of_big_endian_machines_has_the_other_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + "text".encode("utf-16be"))
    with pytest.raises(ValueError, match="iconv -f utf-16 -t utf-8"):
        list(localfiles.read(tmp_path / "a.txt", "text"))


def test_utf_8_with_and_without_a_mark_and_with_a_zero_is_read(tmp_path):
    for content in ("naïve 東京", "\ufeffnaïve 東京", "a zero \0 in a long text"):
        (tmp_path / "a.txt").write_bytes(content.encode())
        assert list(localfiles.read(tmp_path / "a.txt", "text")) == [content.removeprefix("\ufeff")]


def bad_table(rows=1500, bad=1200):
    texts = [b"good"] * rows
    texts[bad] = b"bad \xff"
    return pyarrow.table({"text": pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())})


def test_text_in_parquet_that_is_not_utf_8_is_named_with_its_row(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(bad_table(), file)
    with pytest.raises(ValueError, match=r"data.path: '.*a.parquet' is not UTF-8 \(column text, row 1200\); write"):
        prepare(settings(tmp_path / "cache", source="text", path=str(file)))


def test_text_of_datasets_that_is_not_utf_8_is_named_with_its_row(tmp_path, monkeypatch):
    import datasets

    loaded = datasets.Dataset(datasets.table.InMemoryTable(bad_table()))
    monkeypatch.setattr(hub, "ROWS_PER_SHARD", 1000)
    with pytest.raises(ValueError, match=r"data.source: 'org/name' is not UTF-8 \(column text, row 1200\); write it a"):
        list(hub._documents(loaded, "org/name", "text", None))


def test_text_files_are_not_mistaken(tmp_path):
    """Plain files named in a glob are text, whatever their ending."""
    write_text(tmp_path / "a.rst", 3)
    assert len(localfiles.find(tmp_path / "*.rst", "data.path")) == 1

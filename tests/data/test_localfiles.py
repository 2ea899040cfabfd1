"""Text, JSON lines and parquet: what is read, and what is said about what cannot be."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from relora_ds.data import documents, localfiles, prepare, problems
from tests.data.settings import settings, write_text


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_each_file_of_a_directory_is_read_by_its_suffix(tmp_path):
    (tmp_path / "a.txt").write_text("one file,\none document\n")
    write_jsonl(tmp_path / "b.jsonl", [{"body": "b 0"}, {"body": " "}, {"body": None}, {"body": "b 3", "n": [1]}])
    write_jsonl(tmp_path / "sub" / "c.json.gz", [{"body": "c \ud83d half"}])
    write_parquet(tmp_path / "d.parquet", n=[1, 2, 3], body=["d 0", None, "d 2\n"])
    (tmp_path / "README.md").write_text("not text to train on")
    found = list(localfiles.documents_of(localfiles.find(tmp_path, "data.path"), "body"))
    assert found == ["one file,\none document\n", "b 0", "b 3", "d 0", "d 2\n", "c \ufffd half"]


def test_the_groups_of_files_leave_no_trace(tmp_path, monkeypatch):
    for number in range(30):
        write_text(tmp_path / f"{number:02}.txt", 5, f"w{number}")
    files = localfiles.find(tmp_path, "data.path")
    together = list(localfiles.documents_of(files, "text").read())
    monkeypatch.setattr(localfiles, "GROUP_BYTES", 300)
    apart = list(localfiles.documents_of(files, "text").read())
    assert [text for text, _ in together if text] == [text for text, _ in apart if text]
    assert together[-1][1].shard == 1 and 5 < apart[-1][1].shard < 30
    for text, place in apart:  # any place can be gone on from
        rest = [t for t, _ in localfiles.documents_of(files, "text").read(place) if t]
        assert len(rest) == 30 - place.total, text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x", "meta": 1}\n', r"'body' is not in '.*a.jsonl', line 1; it has: text, meta"),
        ("a.jsonl", b'{"body": "x"}\n{"body": }\n', r"data.path: '.*a.jsonl', line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n{"body": "caf\xe9"}\n', r"data.path: '.*a.jsonl', line 2 is not UTF-8 \(byte 13"),
        ("a.jsonl", b'{"body": 7}\n', r"data.text_column: 'body' holds int, not text, in '.*a.jsonl', line 1"),
        (
            "a.jsonl",
            b'{"body": "x"}\n' + b"[" * 100_000 + b"\n",
            r"a.jsonl', line 2 cannot be read as JSON \(maximum rec",
        ),
        (
            "a.jsonl",
            b'{"body": "x", "n": ' + b"7" * 5000 + b"}\n",
            r"a.jsonl', line 1 cannot be read as JSON \(Exceeds",
        ),
        ("a.json", b'[{"body": "x"}]\n', r"a.json', line 1 is no JSON object; write one object per line"),
        ("a.json", b'{\n  "body": "x"\n}\n', r"a.json', line 1 is not JSON"),
        ("a.json.gz", b"no gzip", r"a.json.gz' is damaged after line 0"),
        ("a.json.gz", gzip.compress(b'{"body": "x"}\n' * 9999)[:-20], r"a.json.gz' is damaged after line \d+"),
        ("a.parquet", b"PAR1 no", r"a.parquet' cannot be read as parquet"),
        ("a.txt", b"ok caf\xe9", r"a.txt' is not UTF-8 \(byte 6\)"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    data = settings(tmp_path / "cache", source="text", path=str(tmp_path / name), text_column="body", vocab_size=300)
    with pytest.raises(ValueError, match=message) as error:
        prepare(data)
    assert "\n" not in str(error.value)


def test_a_file_that_is_found_in_several_ways_is_read_once(tmp_path):
    texts = [write_text(tmp_path / "texts" / name, 3, name).read_text() for name in ("a.txt", "sub/b.txt")]
    (tmp_path / "texts" / "link.txt").symlink_to("a.txt")
    (tmp_path / "texts" / "linked").symlink_to("sub")
    for path in ("texts", "texts/**/*.txt", "texts/**/**/*.txt", "*/**/*.txt"):
        found = localfiles.documents_of(localfiles.find(tmp_path / path, "data.path"), "text")
        assert list(found) == texts, path


def test_a_wrong_column_is_found_before_the_corpus_is_hashed(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", n=[1], body=["x"])
    monkeypatch.setattr("relora_ds.data.file_hashes.sha256_of", lambda *_: pytest.fail("hashed"))
    with pytest.raises(ValueError, match=r"data.text_column: 'text' is not in '.*a.parquet'; it has: n, body"):
        prepare(settings(tmp_path / "cache", source="text", path=str(tmp_path / "a.parquet")))
    write_parquet(tmp_path / "a.parquet", text=[1])
    with pytest.raises(ValueError, match="data.text_column: 'text' holds int, not text"):
        prepare(settings(tmp_path / "cache", source="text", path=str(tmp_path / "a.parquet")))


def test_validation_files_and_fractions_of_records(tmp_path):
    train = write_jsonl(tmp_path / "data" / "a.jsonl", [{"text": f"document {n}"} for n in range(100)])
    held_out = write_parquet(tmp_path / "data" / "valid.parquet", text=["held out 0", "held out 1"])
    data = settings(tmp_path, source="text", path=str(train.parent), validation=str(held_out))
    assert list(documents(data, "train")) == [f"document {n}" for n in range(100)]
    assert list(documents(data, "validation")) == ["held out 0", "held out 1"]
    data = settings(tmp_path, source="text", path=str(train), validation=0.1)
    assert list(documents(data, "validation")) == [f"document {n}" for n in range(9, 100, 10)]
    assert len(list(documents(data, "train"))) == 90


def test_separators_and_archives_are_not_read_as_text(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n")
    assert (
        "is neither plain text nor .parquet, .jsonl"
        in problems(settings(tmp_path, source="text", path=str(tmp_path / "a.csv")))[0]
    )

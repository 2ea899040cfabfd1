"""Documents, the validation split, and every mistake in the `data.` section."""

from pydoc_data.topics import topics

import pytest

from relora_ds.data import documents, problems
from relora_ds.data.corpora import open_corpus
from tests.data.settings import settings, write_text


def both(data):
    return list(documents(data, "train")), list(documents(data, "validation"))


def test_pydocs_splits_into_whole_topics_in_order(tmp_path):
    train, validation = both(settings(tmp_path))
    texts = [topics[key] for key in sorted(topics)]
    assert len(validation) == len(texts) // 20
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text not in validation]


def test_few_documents_are_cut_at_a_line(tmp_path):
    file = write_text(tmp_path / "a.txt", 400)
    train, validation = both(settings(tmp_path, source="text", path=str(file), validation=0.25))
    assert "".join(train + validation) == file.read_text(encoding="utf-8")
    assert train[-1].endswith("\n")
    assert len("".join(validation)) == pytest.approx(0.25 * file.stat().st_size, abs=80)


def test_one_line_is_cut_at_a_space(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six", encoding="utf-8")
    train, validation = both(settings(tmp_path, source="text", path=str(tmp_path / "a.txt"), validation="0.5"))
    assert (train, validation) == (["one two three "], ["four five six"])


def test_directory_and_glob_give_one_document_per_file(tmp_path):
    texts = [write_text(tmp_path / "texts" / f"{name}.txt", 30, name).read_text() for name in ("a", "b", "sub/c")]
    write_text(tmp_path / "texts" / "notes.md", 30)
    held_out = write_text(tmp_path / "texts" / "valid.txt", 30)
    for path in (tmp_path / "texts", tmp_path / "texts" / "**" / "*.txt"):
        train, validation = both(settings(tmp_path, source="text", path=str(path), validation=str(held_out)))
        assert train == texts, "validation files must leave the training files"
        assert validation == [held_out.read_text()]


def test_many_files_hold_out_whole_files(tmp_path):
    for number in range(40):
        write_text(tmp_path / "texts" / f"{number:02}.txt", 3, f"w{number}")
    train, validation = both(settings(tmp_path, source="text", path=str(tmp_path / "texts"), validation=0.1))
    assert (len(train), len(validation)) == (36, 4)


def test_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes("ok caf\u00e9".encode("latin-1"))
    data = settings(tmp_path, source="text", path=str(tmp_path / "latin.txt"))
    with pytest.raises(ValueError, match=r"latin\.txt' is not UTF-8 \(byte 6\)"):
        list(documents(data, "train"))


def test_hash_follows_contents_and_split(tmp_path):
    file = write_text(tmp_path / "a.txt", 100)
    hashes = {open_corpus(settings(tmp_path, source="text", path=str(file), validation=f)).sha256 for f in (0.1, 0.2)}
    again = open_corpus(settings(tmp_path, source="text", path=str(file), validation=0.1)).sha256
    assert len(hashes) == 2 and again in hashes
    file.write_text(file.read_text().replace("hill 3", "hull 3"))  # the same size
    assert open_corpus(settings(tmp_path, source="text", path=str(file), validation=0.1)).sha256 not in hashes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "wikitext3"}, "data.source: 'wikitext3' is unknown (did you mean wikitext2?); use one of wiki"),
        (
            {"source": "jsonl"},
            "data.source: 'jsonl' is unknown; use one of wikitext2, pydocs, gutenberg, c4, text, "
            "pretokenized, or org/name of the Hugging Face hub; JSON lines and parquet are read by data.source=text",
        ),
        ({"source": "./gone"}, "data.source: ./gone does not exist"),
        ({"source": "pretokenized"}, "data.path: null, and data.source pretokenized reads it"),
        ({"source": "text"}, "data.path: null, and data.source text reads it"),
        ({"path": "x.txt"}, "data.path: x.txt is not read with data.source pydocs; use data.source=text"),
        (
            {"source": "text", "path": "x.txt"},
            "data.path: x.txt does not exist",
        ),
        ({"source": "text", "path": "no/*.txt"}, "data.path: no/*.txt does not exist"),
        ({"validation": 1.5}, "data.validation: 1.5 is outside (0, 1)"),
        ({"validation": "0"}, "data.validation: '0' is not a fraction"),
        ({"validation": "gone.txt"}, "data.validation: gone.txt does not exist"),
        ({"tokenizer": "./gone"}, "data.tokenizer: ./gone does not exist"),
        ({"vocab_size": 256}, "data.vocab_size: 256 is not above 260"),
        ({"seq_len": 1}, "data.seq_len: 1 leaves no next token"),
        ({"max_tokens": 10}, "data.max_tokens: 10 does not hold one sequence of data.seq_len 32"),
        ({"text_column": "body"}, "data.text_column: body has no effect"),
    ],
)
def test_problems_names_field_value_and_remedy(tmp_path, changes, message):
    found = problems(settings(tmp_path, **changes))
    assert len(found) == 1 and found[0].startswith(message), found


def test_problems_reports_all_at_once_and_nothing_when_right(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "no_texts").mkdir()
    wrong = settings(
        tmp_path,
        source="text",
        path=str(tmp_path / "empty.txt"),
        validation=str(tmp_path / "no_texts"),
    )
    found = " ".join(problems(wrong))
    assert "only empty files" in found and "holds no .txt, .parquet" in found
    assert len(problems(settings(tmp_path, source="text", seq_len=0, vocab_size=1))) == 3
    assert problems(settings(tmp_path)) == problems(settings(tmp_path, source="wikitext2")) == []

"""Corpora through `datasets`: C4 from shards of its layout, other corpora, and a hub that does not answer."""

import gzip
import importlib
import json
import time

import huggingface_hub.constants
import numpy as np
import pytest

from relora_ds.data import documents, hub, prepare, problems, tokenization
from relora_ds.data import tokenizer as tokenizers
from tests.data.settings import settings

DOCUMENTS_PER_SHARD = 60


def text(split, shard, number):
    return f"{split} document {number} of shard {shard}, {number * 7919 % 10007:x} goes over hill {number % 13}.\n" * 5


def write_shard(directory, split, shard, num_shards):
    rows = [
        {"text": text(split, shard, number), "timestamp": "2019-04-25T12:57:54Z", "url": f"https://x/{number}"}
        for number in range(DOCUMENTS_PER_SHARD)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"c4-{split}.{shard:05}-of-{num_shards:05}.json.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


@pytest.fixture
def c4(tmp_path):
    """Three training shards and two for validation, laid out like allenai/c4; the last of each cannot be read."""
    paths = [write_shard(tmp_path / "c4" / "en", "train", shard, 3) for shard in range(3)]
    paths += [write_shard(tmp_path / "c4" / "en", "validation", shard, 2) for shard in range(2)]
    for path in (paths[2], paths[4]):
        path.write_bytes(b"this shard must not be opened")
    return tmp_path / "c4"


def c4_settings(tmp_path, c4, **changes):
    return settings(
        tmp_path / "cache", **{"source": "c4", "path": str(c4), "vocab_size": 300, "max_tokens": 18_000, **changes}
    )


def test_c4_stops_at_max_tokens_and_opens_no_shard_too_many(tmp_path, c4):
    prepared = prepare(c4_settings(tmp_path, c4))
    tokenizer = tokenizers.load(prepared.tokenizer_dir)
    texts = [text("train", shard, number) for shard in range(2) for number in range(DOCUMENTS_PER_SHARD)]
    ids = np.concatenate([[*ids, prepared.eos_id] for ids in tokenizers.encode(tokenizer, texts)])
    np.testing.assert_array_equal(prepared.train, ids[:18_000])
    in_first_shard = np.flatnonzero(ids == prepared.eos_id)[DOCUMENTS_PER_SHARD - 1] + 1
    assert in_first_shard < 18_000 < len(ids), "the test must need the second shard and not the third"
    # Validation: whole documents, as many as hold a twentieth of the training tokens.
    assert 900 <= len(prepared.validation) < 1300
    held_out = tokenizer.decode(prepared.validation[prepared.validation != prepared.eos_id])
    assert held_out == "".join(text("validation", 0, n) for n in range(20))[: len(held_out)]
    assert (prepared.validation_words, prepared.validation_bytes) == (len(held_out.split()), len(held_out.encode()))


def test_c4_reads_exactly_to_the_end_of_a_shard(tmp_path, c4):
    """The shard after the one whose last token is the last that is wanted stays closed too."""
    first = prepare(c4_settings(tmp_path, c4))
    end = np.flatnonzero(first.train == first.eos_id)[DOCUMENTS_PER_SHARD - 1] + 1
    (c4 / "en" / "c4-train.00001-of-00003.json.gz").write_bytes(b"closed as well")
    given = c4_settings(tmp_path, c4, tokenizer=str(first.tokenizer_dir), max_tokens=int(end))
    np.testing.assert_array_equal(prepare(given).train, first.train[:end])
    with pytest.raises(ValueError, match=r"c4-train.00001-of-00003.json.gz cannot be read \(BadGzipFile"):
        prepare(c4_settings(tmp_path, c4, tokenizer=str(first.tokenizer_dir), max_tokens=int(end) + 1))


def test_c4_keeps_its_pieces_until_the_damaged_shard_is_replaced(tmp_path, c4, monkeypatch):
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 1)
    tokenizer_dir = prepare(c4_settings(tmp_path, c4)).tokenizer_dir
    data = c4_settings(tmp_path, c4, tokenizer=str(tokenizer_dir), max_tokens=40_000)
    with pytest.raises(ValueError, match="c4-train.00002-of-00003.json.gz cannot be read.*starts from the beginning"):
        prepare(data)
    (partial,) = (tmp_path / "cache" / "tokens").glob(".*.partial")
    progress = tokenization.progress_of(partial, json.loads((partial / "progress.json").read_text())["revision"])
    assert progress.train.place == [2, 0, 2 * DOCUMENTS_PER_SHARD]
    write_shard(c4 / "en", "train", 2, 3)  # as the message says: another corpus, and another cache entry
    assert prepare(data).directory.name not in partial.name


def test_c4_errors_come_before_any_reading(tmp_path, c4):
    assert problems(c4_settings(tmp_path, c4)) == []
    assert problems(c4_settings(tmp_path, c4, max_tokens=None))[0].startswith("data.max_tokens: null, and c4")
    assert "holds no shard c4-train.*.json.gz" in problems(c4_settings(tmp_path, tmp_path))[0]
    assert "holds no shard c4-other.*.json.gz" in problems(c4_settings(tmp_path, c4, split="other"))[0]
    assert problems(c4_settings(tmp_path, c4 / "en")) == []


def test_c4_held_out_fraction_and_other_shards(tmp_path, c4):
    data = c4_settings(tmp_path, c4, validation=0.1)
    found = documents(data, "validation")
    assert [next(found) for _ in range(3)] == [text("train", 0, n) for n in (9, 19, 29)]
    found = documents(c4_settings(tmp_path, c4, split="validation"), "train")
    assert next(found) == text("validation", 0, 0)
    before = prepare(c4_settings(tmp_path, c4)).directory
    write_shard(c4 / "en", "train", 0, 3)  # written again: another mtime
    assert prepare(c4_settings(tmp_path, c4)).directory != before


def test_c4_that_trains_on_the_validation_shards_holds_out_a_part_of_them(tmp_path, c4):
    write_shard(c4 / "en", "validation", 1, 2)
    data = c4_settings(tmp_path, c4, split="validation")
    shards = [text("validation", shard, n) for shard in range(2) for n in range(DOCUMENTS_PER_SHARD)]
    assert list(documents(data, "validation")) == shards[19::20]
    assert list(documents(data, "train")) == [own for own in shards if own not in shards[19::20]]


@pytest.fixture
def corpus(tmp_path):
    """A corpus of the hub's layout, with two configurations; only one has a validation split."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for name in ("one_train", "one_validation", "two_train"):
        rows = [
            {"body": f"{name} row {number} over hill {number * 7919 % 10007:x}", "n": number} for number in range(200)
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "README.md").write_text("""---
configs:
- config_name: one
  data_files: [{split: train, path: one_train.jsonl}, {split: validation, path: one_validation.jsonl}]
- config_name: two
  data_files: [{split: train, path: two_train.jsonl}]
---
""")
    return directory


@pytest.mark.parametrize("max_tokens", [None, 1500])  # loaded, streamed
def test_a_corpus_of_datasets_with_config_and_split(tmp_path, corpus, monkeypatch, max_tokens):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(hub, "ROWS_PER_SHARD", 64)
    data = settings(
        tmp_path / "cache", source=str(corpus), config="one", text_column="body", max_tokens=max_tokens, vocab_size=300
    )
    rows = {
        name: [row["body"] for row in map(json.loads, (corpus / f"{name}.jsonl").read_text().splitlines())]
        for name in ("one_train", "one_validation", "two_train")
    }
    assert list(documents(data, "train")) == rows["one_train"]
    assert list(documents(data, "validation")) == rows["one_validation"]
    assert len(prepare(data).train) > 1500 if max_tokens is None else len(prepare(data).train) == 1500
    data.split = "validation"
    assert list(documents(data, "train"))[0] == rows["one_validation"][0]
    data.config, data.split = "two", "train"  # without a split for validation: a fraction
    assert list(documents(data, "validation")) == rows["two_train"][19::20]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"config": None},
            "data.config: None does not name a configuration of .*: Config name is missing.*'one', 'two'",
        ),
        ({"config": "three"}, "data.config: 'three' does not name .*Available: .'one', 'two'"),
        ({"split": "test"}, "data.split: 'test' is not in .*; it has: train, validation"),
        ({"text_column": "text"}, "data.text_column: 'text' is not in .*; it has: body, n"),
        ({"text_column": "n"}, "data.text_column: 'n' holds int, not text"),
    ],
)
def test_what_is_wrong_with_a_corpus_is_named(tmp_path, corpus, changes, message):
    data = settings(
        tmp_path / "cache",
        source=str(corpus),
        **{"config": "one", "text_column": "body", "max_tokens": 500, "vocab_size": 300, **changes},
    )
    with pytest.raises(ValueError, match=message):
        prepare(data)


@pytest.fixture
def closed_hub(monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 60.0)  # a busy machine may take its time to be refused
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"source": "c4", "max_tokens": 1000}, "local shards in data.path, or `python -m relora_ds prepare`"),
        ({"source": "org/name", "max_tokens": 1000}, "work offline: `python -m relora_ds prepare`"),
        ({"source": "org/name"}, "HF_HUB_OFFLINE=1"),
        ({"tokenizer": "org/tokenizer"}, "data.tokenizer: 'org/tokenizer' cannot be loaded"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_said_at_once_in_one_line(tmp_path, closed_hub, changes, remedy):
    importlib.import_module("datasets")  # takes seconds by itself
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        prepare(settings(tmp_path, **changes))
    assert time.monotonic() - start < 20, "datasets and transformers retry for 23 s and 46 s"
    message = str(error.value)
    assert "\n" not in message and remedy in message and "refused" in message
    assert ("allenai/c4" if changes.get("source") == "c4" else "org/") in message


def test_what_was_tokenized_needs_no_hub_any_more(tmp_path, corpus, monkeypatch):
    data = settings(
        tmp_path / "cache", source=str(corpus), config="one", text_column="body", max_tokens=500, vocab_size=300
    )
    first = prepare(data)
    monkeypatch.setattr(hub, "open_splits", lambda *_, **__: pytest.fail("opened again"))
    assert prepare(data).fingerprint == first.fingerprint

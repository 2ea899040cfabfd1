"""A directory of tokens that is carried to another machine."""

import json
import shutil

import numpy as np
import pytest

from relora_ds.data import prepare, problems
from relora_ds.data import tokenizer as tokenizers
from relora_ds.data.pretokenized import write
from tests.data.settings import settings


@pytest.fixture
def carried(tmp_path):
    """(data prepared on one machine, the directory on another one: the first machine's cache is gone)."""
    prepared = prepare(settings(tmp_path / "first"))
    write(prepared.directory, tokenizers.load(prepared.tokenizer_dir), tmp_path / "written")
    tokens = {split: np.array(getattr(prepared, split)) for split in ("train", "validation")}
    shutil.move(tmp_path / "written", tmp_path / "second" / "tokens")
    shutil.rmtree(tmp_path / "first")
    return prepared, tokens, tmp_path / "second" / "tokens"


def other_machine(directory, **changes):
    return settings(directory.parent / "cache", source="pretokenized", path=str(directory), **changes)


def test_the_other_machine_has_the_same_data(carried):
    first, tokens, directory = carried
    second = prepare(other_machine(directory))
    assert second.fingerprint == first.fingerprint
    for split, ids in tokens.items():
        np.testing.assert_array_equal(getattr(second, split), ids)
    names = ("validation_words", "validation_bytes", "vocab_size", "eos_id")
    assert [getattr(first, name) for name in names] == [getattr(second, name) for name in names]
    assert len(tokenizers.load(second.tokenizer_dir)) == 600
    assert second.tokenizer_dir == directory / "tokenizer"
    assert sorted(path.name for path in directory.iterdir()) == [
        "metadata.json",
        "tokenizer",
        "train.bin",
        "validation.bin",
    ]


def test_a_tokenizer_that_was_given_goes_along(tmp_path):
    given = prepare(settings(tmp_path / "a")).tokenizer_dir
    prepared = prepare(settings(tmp_path / "b", tokenizer=str(given), max_tokens=5000))
    assert not (prepared.directory / "tokenizer").exists()
    write(prepared.directory, tokenizers.load(given), tmp_path / "c" / "tokens")
    written = tmp_path / "c" / "tokens" / "tokenizer" / "tokenizer.model"  # llama.cpp's converter reads it
    assert written.read_bytes() == (given / "tokenizer.model").read_bytes()
    shutil.rmtree(given)
    carried = prepare(other_machine(tmp_path / "c" / "tokens"))
    assert carried.fingerprint == prepared.fingerprint
    assert tokenizers.load(carried.tokenizer_dir).eos_token_id == prepared.eos_id


def test_other_lengths_fewer_tokens_and_keys_of_the_recipe_it_came_from(carried):
    first, tokens, directory = carried
    assert problems(other_machine(directory, seq_len=77, validation=0.1, tokenizer="./gone", text_column="x")) == []
    assert prepare(other_machine(directory, seq_len=77, max_tokens=10**9)).fingerprint == first.fingerprint
    cut = prepare(other_machine(directory, max_tokens=1000))
    np.testing.assert_array_equal(cut.train, tokens["train"][:1000])
    assert cut.fingerprint != first.fingerprint


def test_what_is_no_such_directory_or_damaged(carried):
    _, _, directory = carried
    for path in (directory.parent, directory / "tokenizer", directory / "train.bin"):
        found = problems(settings(directory.parent / "cache", source="pretokenized", path=str(path)))
        assert len(found) == 1 and found[0].startswith(f"data.path: {str(path)!r} holds no tokens")
    found = problems(settings(directory.parent / "cache", source="pretokenized", path="gone"))
    assert len(found) == 1 and found[0].startswith("data.path: gone does not exist")
    content = (directory / "train.bin").read_bytes()
    (directory / "train.bin").write_bytes(content[:-2])
    assert f"train.bin' has {len(content) - 2} bytes of {len(content)}; copy" in problems(other_machine(directory))[0]
    (directory / "train.bin").write_bytes(content[:-2] + b"\0\0")  # the right size, another content
    with pytest.raises(ValueError, match=r"train.bin is damaged \(sha256"):
        prepare(other_machine(directory))
    (directory / "train.bin").write_bytes(content)
    shutil.rmtree(directory / "tokenizer")
    assert "tokenizer.model' is missing; copy the directory again" in problems(other_machine(directory))[0]


def test_nothing_is_overwritten(carried, tmp_path):
    _, _, directory = carried
    given = tokenizers.load(directory / "tokenizer")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis exists and is not empty"):
        write(directory, given, tmp_path / "thesis")
    (tmp_path / "empty").mkdir()
    write(directory, given, tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "metadata.json").read_text())["vocab_size"] == 600

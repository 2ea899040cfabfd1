"""The token cache: what is in it, when it is rebuilt, and what survives a crash or a race."""

import json
import multiprocessing
from pydoc_data.topics import topics

import numpy as np
import pytest

from relora_ds.data import documents, preparation, prepare, tokenization
from relora_ds.data import tokenizer as tokenizers
from tests.data.settings import settings


@pytest.fixture
def builds(monkeypatch):
    """Counts how often the corpus is tokenized."""
    calls = []
    build = preparation._build
    monkeypatch.setattr(preparation, "_build", lambda *arguments: calls.append(1) or build(*arguments))
    return calls


def text_settings(tmp_path, **changes):
    path = tmp_path / "text.txt"
    if not path.exists():
        path.write_text("".join(topics[key] for key in sorted(topics)[:20]), encoding="utf-8")
    return settings(tmp_path / "cache", **{"source": "text", "path": str(path), **changes})


def test_tokens_are_the_documents_with_eos_after_each(tmp_path):
    data = settings(tmp_path)
    prepared = prepare(data, seed=1)
    tokenizer = tokenizers.load(prepared.tokenizer_dir)
    for split, tokens in (("train", prepared.train), ("validation", prepared.validation)):
        texts = list(documents(data, split))
        ids = [[*ids, prepared.eos_id] for ids in tokenizers.encode(tokenizer, texts)]
        np.testing.assert_array_equal(tokens, np.concatenate(ids))
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert np.count_nonzero(tokens == prepared.eos_id) == len(texts)
    text = "".join(documents(data, "validation"))
    assert prepared.validation_bytes == len(text.encode())
    assert prepared.validation_words == sum(len(text.split()) for text in documents(data, "validation"))
    assert prepared.vocab_size == len(tokenizer) == 600


def test_long_documents_are_tokenized_in_parts_with_the_same_result(tmp_path, monkeypatch):
    whole = prepare(settings(tmp_path / "a"))
    monkeypatch.setattr(tokenization, "MAX_PART_CHARACTERS", 500)
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 1200)
    parts = prepare(settings(tmp_path / "b"))
    np.testing.assert_array_equal(whole.train, parts.train)
    np.testing.assert_array_equal(whole.validation, parts.validation)


def test_cache_is_hit_for_other_lengths_and_seeds_and_missed_for_other_ids(tmp_path, builds):
    first = prepare(text_settings(tmp_path), seed=0)
    same = [prepare(text_settings(tmp_path), seed=7), prepare(text_settings(tmp_path, seq_len=64))]
    assert len(builds) == 1 and {prepared.fingerprint for prepared in same} == {first.fingerprint}
    others = [
        prepare(text_settings(tmp_path, **changes)).fingerprint
        for changes in ({"vocab_size": 500}, {"max_tokens": 1000}, {"validation": 0.1})
    ]
    # The same ids in another way: another entry of the cache, but the same data.
    given = prepare(text_settings(tmp_path, tokenizer=str(first.tokenizer_dir)))
    assert given.directory != first.directory and given.fingerprint == first.fingerprint
    text = tmp_path / "text.txt"
    text.write_text(text.read_text().replace("the", "teh"))  # the same size
    others.append(prepare(text_settings(tmp_path)).fingerprint)
    assert len({first.fingerprint, *others}) == 5 and len(builds) == 6


def test_the_same_bytes_under_another_suffix_are_another_corpus(tmp_path):
    rows = "".join(json.dumps({"text": f"row {n} over the hill"}) + "\n" for n in range(60))
    lines = prepare(_given(tmp_path, "a.txt", rows))
    documents = prepare(_given(tmp_path, "a.jsonl", rows))
    assert documents.directory != lines.directory
    assert np.count_nonzero(documents.train == documents.eos_id) == 57 > np.count_nonzero(lines.train == lines.eos_id)
    held_out = [
        prepare(_given(tmp_path, "a.txt", rows, validation=str(tmp_path / name))).validation
        for name in ("v.txt", "v.jsonl")
        if (tmp_path / name).write_text(rows)
    ]
    assert [np.count_nonzero(tokens == lines.eos_id) for tokens in held_out] == [1, 60]


def _given(tmp_path, name, text, **changes):
    (tmp_path / name).write_text(text)
    return settings(tmp_path / "cache", source="text", path=str(tmp_path / name), vocab_size=300, **changes)


def test_given_tokenizer_is_used_and_named(tmp_path):
    first = prepare(text_settings(tmp_path))
    second = prepare(text_settings(tmp_path, tokenizer=str(first.tokenizer_dir)))
    assert second.tokenizer_dir == first.tokenizer_dir
    np.testing.assert_array_equal(first.train, second.train)


def test_max_tokens_is_exact(tmp_path):
    full, cut = prepare(text_settings(tmp_path)), prepare(text_settings(tmp_path, max_tokens=1001))
    np.testing.assert_array_equal(cut.train, full.train[:1001])
    np.testing.assert_array_equal(cut.validation, full.validation)


@pytest.mark.parametrize("damage", ["metadata.json", "train.bin", "truncate"])
def test_half_written_cache_is_rebuilt(tmp_path, builds, damage):
    first = prepare(text_settings(tmp_path))
    expected = np.array(first.train)
    directory = first.tokenizer_dir.parent
    if damage == "truncate":
        (directory / "train.bin").write_bytes((directory / "train.bin").read_bytes()[:-2])
    else:
        (directory / damage).unlink()
    np.testing.assert_array_equal(prepare(text_settings(tmp_path)).train, expected)
    assert len(builds) == 2


def test_a_crash_while_building_leaves_no_entry(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "write_tokens", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            prepare(text_settings(tmp_path))
    assert all(path.name.endswith(".lock") for path in (tmp_path / "cache" / "tokens").iterdir())
    assert len(prepare(text_settings(tmp_path)).train) > 0


def _race(data, barrier, results):
    build = preparation._build
    builds = []
    preparation._build = lambda *arguments: builds.append(1) or build(*arguments)
    barrier.wait()
    prepared = prepare(data)
    results.put((len(builds), prepared.fingerprint, int(prepared.train.sum(dtype=np.int64))))


def test_racing_processes_build_once_and_agree(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    data = text_settings(tmp_path)
    processes = [context.Process(target=_race, args=(data, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(builds for builds, *_ in found) == [0, 1]
    assert found[0][1:] == found[1][1:]


def test_too_small_and_wrong_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match=r"data.seq_len: 9000000 is more than the \d+ training tokens"):
        prepare(settings(tmp_path, seq_len=9_000_000))
    with pytest.raises(ValueError, match="data.source: 'x' is unknown.*\n.*data.seq_len: 1 "):
        prepare(settings(tmp_path, source="x", seq_len=1))
    (tmp_path / "file").touch()
    for place in ("file/cache", "/proc/cache"):  # below a file; where not even root can make a directory
        with pytest.raises(ValueError, match="data.cache_dir: '.*cache/tokens' cannot be written .*; name a directory"):
            prepare(settings(tmp_path / place))
    (tmp_path / "blank.txt").write_text(" \n \n")
    with pytest.raises(ValueError, match="holds no text"):
        prepare(settings(tmp_path, source="text", path=str(tmp_path / "blank.txt")))

"""Mixtures of corpora: one vocabulary, exact proportions for every world size, validation texts by name."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from relora_ds.config.data_config import MixSource, ValidationSet
from relora_ds.data import TrainLoader, documents, mixture, preparation, prepare
from relora_ds.data import tokenizer as tokenizers
from relora_ds.data.reading import DataWarning
from relora_ds.data.rows import Masking, MixedRows, Padding, training_rows
from tests.data.settings import settings, write_text

WORDS = {"hills": "peak", "seas": "wave", "woods": "tree"}
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture
def data(tmp_path):
    """Three corpora of different sizes, each with words of its own."""
    for number, (name, word) in enumerate(WORDS.items()):
        for file in range(24):
            write_text(tmp_path / name / f"{file:02}.txt", 8 * (number + 1), f"{word}{file}")
    mix = [MixSource(path=str(tmp_path / name), weight=weight) for name, weight in zip(WORDS, WEIGHTS, strict=True)]
    return settings(tmp_path / "cache", mix=mix, vocab_size=340)


def test_the_corpora_are_in_the_ids_of_one_tokenizer_trained_on_all_of_them(data, monkeypatch):
    prepared = prepare(data)
    assert [(part.name, part.weight) for part in prepared.parts] == list(zip(WORDS, WEIGHTS, strict=True))
    tokenizer = tokenizers.load(prepared.tokenizer_dir)
    for part, section in zip(prepared.parts, data.parts(), strict=True):
        text = tokenizer.decode(part.data.train[:200].tolist())
        assert WORDS[part.name] in text and sum(word in text for word in WORDS.values()) == 1
        texts = list(documents(section, "train"))
        assert (part.data.train == prepared.eos_id).sum() == len(texts)
    pieces = "".join(tokenizer.get_vocab())
    assert all(word in pieces for word in WORDS.values())
    assert prepared.train_tokens == sum(len(part.data.train) for part in prepared.parts) and not len(prepared.train)
    joined = np.concatenate([part.data.validation for part in prepared.parts])
    np.testing.assert_array_equal(prepared.validation, joined)
    assert list(documents(data, "validation")) == [
        text for section in data.parts() for text in documents(section, "validation")
    ]
    monkeypatch.setattr(tokenizers, "train", None)
    monkeypatch.setattr(preparation, "_build", None)
    again = prepare(dataclasses.replace(data, seq_len=16))
    assert again.fingerprint == prepared.fingerprint


def test_other_weights_are_other_training_data(data):
    other = [dataclasses.replace(one, weight=weight) for one, weight in zip(data.mix, (0.4, 0.4, 0.2), strict=True)]
    named = [dataclasses.replace(one, name=f"n{number}") for number, one in enumerate(data.mix)]
    given = dataclasses.replace(data, tokenizer=str(prepare(data).tokenizer_dir))
    first = prepare(given).fingerprint
    assert prepare(dataclasses.replace(given, mix=other)).fingerprint != first
    assert prepare(dataclasses.replace(given, mix=named)).fingerprint == first


def corpora_of_steps(prepared, world_size: int, steps: int, state=None, batch: int = 6):
    """Return ([steps, batch] which corpus each row is of, the state afterwards), put together from all ranks."""
    loaders = [
        TrainLoader(
            prepared.trains(), 32, batch, batch // world_size, rank, world_size, seed=5, weights=prepared.weights
        )
        for rank in range(world_size)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    known = {}
    for number, tokens in enumerate(prepared.trains()):
        for row in tokens[: len(tokens) // 32 * 32].reshape(-1, 32):
            known[row.astype(np.int64).tobytes()] = number
    found = []
    for _ in range(steps):
        rows = np.concatenate([micro["input_ids"].numpy() for loader in loaders for micro in loader.next_step()])
        found.append([known[row.tobytes()] for row in rows])
    assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1
    return np.array(found), loaders[0].state_dict()


def test_proportions_are_exact_to_one_row_through_resumes_at_other_world_sizes(data):
    """10,000 steps: a state is what a kill leaves of a run."""
    prepared = prepare(data)
    parts, state = [], None
    for world_size, steps in ((1, 3000), (3, 2500), (2, 3500), (6, 1000)):
        found, state = corpora_of_steps(prepared, world_size, steps, state)
        parts.append(found)
        state = json.loads(json.dumps(state))
    counts = np.cumsum((np.concatenate(parts)[..., None] == np.arange(3)).sum(1), axis=0)
    exact = 6 * np.arange(1, 10_001)[:, None] * np.array(WEIGHTS)
    assert np.abs(counts - exact).max() < 1
    assert state == {"taken": counts[-1].tolist()}


def test_batches_do_not_depend_on_the_world_size(data):
    prepared = prepare(data)
    one, two = (corpora_of_steps(prepared, size, 20)[0] for size in (1, 2))
    assert (np.sort(one) == np.sort(two)).all()


def test_islands_share_every_corpus():
    """Corpora of the same weight alternate, so that every second row is always of the same one."""
    corpora = [np.full(6400, number, dtype=np.uint16) for number in range(2)]
    islands = [
        TrainLoader(corpora, 32, 8, 8, 0, 1, seed=5, island=island, islands=2, weights=[0.5, 0.5])
        for island in range(2)
    ]
    of_each = np.array([[island.next_step()[0]["input_ids"][:, 0].numpy() for _ in range(100)] for island in islands])
    assert (of_each.sum((0, 2)) == 8).all(), "of all islands together half of each step"
    assert (np.abs(of_each.mean((1, 2)) - 0.5) < 0.1).all()
    assert islands[0].state_dict() == islands[1].state_dict() == {"taken": [800, 800]}


@pytest.mark.parametrize("layout", [None, Masking(0), Padding(0, 1)])
def test_rows_of_several_corpora_come_in_the_order_that_is_asked_for(layout):
    corpora = [training_rows(np.arange(n, n + 60) % 7, 5, layout) for n in (0, 3, 5)]
    mixed = MixedRows(corpora)
    alone = [corpus.batch(np.array([row])) for corpus in corpora for row in range(len(corpus))]
    indices = np.array([len(mixed) - 1, 0, len(corpora[0]), 2, len(corpora[0]) - 1, 0])
    batch = mixed.batch(indices)
    for name, values in batch.items():
        np.testing.assert_array_equal(values, np.concatenate([alone[index][name] for index in indices]))
    assert mixed.num_predicted(indices) == (batch["labels"][:, 1:] != -100).sum()


def test_pretokenized_corpora_of_one_vocabulary_are_mixed_and_of_two_refused(data, tmp_path):
    from relora_ds.data.pretokenized import read_metadata, write, write_metadata

    prepared = prepare(data)
    tokenizer = tokenizers.load(prepared.tokenizer_dir)
    for part in prepared.parts:
        write(part.data.directory, tokenizer, tmp_path / "out" / part.name)
    mix = [
        MixSource(source="pretokenized", path=str(tmp_path / "out" / name), weight=weight)
        for name, weight in zip(WORDS, WEIGHTS, strict=True)
    ]
    copied = prepare(dataclasses.replace(data, mix=mix))
    assert copied.fingerprint == prepared.fingerprint and copied.vocab_size == prepared.vocab_size

    ends_otherwise = tmp_path / "out" / mix[2].label  # as of a base model and of one that was tuned to chat
    metadata = read_metadata(ends_otherwise)
    write_metadata(ends_otherwise, {**metadata, "eos_id": 1})
    with pytest.raises(
        ValueError, match=r"^data\.mix\[2\]\.path: .* ends documents with the id 1, and not 2 as hills;"
    ):
        prepare(dataclasses.replace(data, mix=mix))
    write_metadata(ends_otherwise, metadata)

    other = prepare(settings(tmp_path / "cache", source="text", path=data.mix[0].path, vocab_size=330))
    write(other.directory, tokenizers.load(other.tokenizer_dir), tmp_path / "out" / "other")
    mix[1] = dataclasses.replace(mix[1], path=str(tmp_path / "out" / "other"))
    with pytest.raises(ValueError, match=r"^data\.mix\[1\]\.path: '.*other' is in another vocabulary than hills; prep"):
        prepare(dataclasses.replace(data, mix=mix))


def test_a_corpus_that_cannot_be_read_or_is_too_small_is_named(data, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    mix = [*data.mix[:2], MixSource(path=str(tmp_path / "empty.txt"), weight=0.2)]
    with pytest.raises(ValueError, match=r"^data\.mix\[2\]\.path: '.*empty.txt' holds only empty files"):
        prepare(dataclasses.replace(data, mix=mix))
    (tmp_path / "small.txt").write_text("a few words\n" * 3)
    mix[2] = MixSource(path=str(tmp_path / "small.txt"), weight=0.2)
    with pytest.raises(ValueError, match=r"^data\.seq_len: 32 is more than the \d+ training tokens of '.*small.txt'"):
        prepare(dataclasses.replace(data, mix=mix))


def test_documents_for_the_tokenizer_are_drawn_in_proportion():
    texts = [["a" * 10] * 50, ["b" * 30] * 50]
    drawn = list(mixture.in_proportion([iter(each) for each in texts], [0.25, 0.75]))
    assert drawn == [text for pair in zip(*texts, strict=True) for text in pair]
    longer = list(mixture.in_proportion([iter(["a" * 10]), iter(texts[1])], [0.9, 0.1]))
    assert len(longer) == 51  # what is left when one has ended follows


def test_validation_sets_have_the_documents_of_their_files(data, tmp_path):
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps({"body": f"peak{n} over wave{n}"}) + "\n" for n in range(9))
    )
    more = ValidationSet(path=str(tmp_path / "more.jsonl"), text_column="body")
    prepared = prepare(dataclasses.replace(data, validation_sets=[more]))
    ((name, tokens),) = prepared.sets
    text = tokenizers.load(prepared.tokenizer_dir).decode(tokens.tolist())
    assert name == "more" and (tokens == prepared.eos_id).sum() == 9 and "peak8 over wave8" in text
    assert prepared.fingerprint == prepare(data).fingerprint
    (tmp_path / "more.jsonl").write_text(json.dumps({"body": "wave9 over peak9"}) + "\n")
    ((_, changed),) = prepare(dataclasses.replace(data, validation_sets=[more])).sets
    assert (changed == prepared.eos_id).sum() == 1
    (tmp_path / "blank.txt").write_text(" \n")
    blank = ValidationSet(path=str(tmp_path / "blank.txt"))
    with pytest.raises(
        ValueError, match=r"^data\.validation_sets\[0\]\.path: '.*blank.txt' holds no text; name another"
    ):
        prepare(dataclasses.replace(data, validation_sets=[blank]))


def test_mistakes_in_validation_sets_are_found_before_a_corpus_is_tokenized(data, tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "_mixture", None)
    (tmp_path / "none").mkdir()
    (tmp_path / "more.jsonl").write_text('{"body": "some text"}\n')
    for path, message in (
        ("none", r"^data\.validation_sets\[1\]\.path: directory '.*none' holds no "),
        ("more.jsonl", r"^data\.validation_sets\[1\]\.text_column: 'text' is not in '.*more.jsonl'"),
    ):
        sets = [ValidationSet(path=data.mix[0].path, name="first"), ValidationSet(path=str(tmp_path / path))]
        with pytest.raises(ValueError, match=message):
            prepare(dataclasses.replace(data, validation_sets=sets))


def test_validation_text_that_is_trained_on_by_another_key_is_named(data, tmp_path):
    """As of a directory in which one file was meant to be kept apart, and of a part that is given more weight."""
    hills, seas, woods = data.mix
    kept, one_file = tmp_path / "kept.txt", tmp_path / "hills" / "03.txt"
    write_text(kept, 20, "lake")
    sets = [ValidationSet(path=str(kept)), ValidationSet(path=str(one_file), name="one")]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prepare(dataclasses.replace(data, mix=[hills, dataclasses.replace(hills, name="again", weight=0.5)]))
    assert not [str(one.message) for one in said], "the same documents are held out"
    for changes, message in (
        ({"validation_sets": sets}, r"^data\.validation_sets\[1\]\.path: the run also trains on .*/hills/03\.txt; its"),
        (
            {
                "mix": [
                    dataclasses.replace(seas, weight=0.8, validation=str(one_file)),
                    dataclasses.replace(hills, weight=0.2),
                ]
            },
            r"^data\.mix\[0\]\.validation: the run also trains on .*/hills/03\.txt; its",
        ),
        (
            {"mix": [hills, dataclasses.replace(woods, weight=0.5, path=str(one_file), validation=str(kept))]},
            r"^data\.mix\[0\]\.path, part of which is held out: the run also trains on .*/hills/03\.txt; its",
        ),
    ):
        with pytest.warns(DataWarning, match=message) as said:
            prepare(dataclasses.replace(data, **changes))
        assert len(said) == 1

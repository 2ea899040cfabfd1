"""`data.deduplicate`: which training documents are left out, and where it is refused."""

import numpy as np
import pytest

from relora_ds.data import checks, deduplication, documents, prepare
from relora_ds.data.deduplication import without_copies
from relora_ds.data.reading import DataWarning, hold_out, in_memory
from tests.data.settings import settings

VOCABULARY = [f"word{number}" for number in range(3000)]


def text(seed: int, words: int = 300) -> str:
    return " ".join(np.random.default_rng(seed).choice(VOCABULARY, words))


def altered(document: str, every: int) -> str:
    """The document with one word in `every` replaced."""
    words = document.split()
    words[::every] = ["other"] * len(words[::every])
    return " ".join(words)


def test_copies_are_left_out_whatever_their_case_and_spaces():
    train = [text(n) for n in range(40)]
    held_out = [text(n) for n in range(100, 110)]
    copies = [text(3).upper(), text(7).replace(" ", "\n  "), altered(text(105), 100), altered(text(20), 100)]
    kept, dropped = without_copies(in_memory([*train, *copies, text(50)]), in_memory(held_out), 0.8)
    assert dropped == 4 and list(kept) == [*train, text(50)]


def test_documents_that_share_less_stay():
    train = [text(0), altered(text(0), 10), text(0)[: len(text(0)) // 2], "short", "short one"]
    kept, dropped = without_copies(in_memory(train), in_memory([text(1)]), 0.8)
    assert dropped == 0 and list(kept) == train
    kept, dropped = without_copies(in_memory(train), in_memory([text(1)]), 0.2)
    assert list(kept) == [train[0], *train[3:]]


def test_copies_just_above_the_threshold_are_found():
    """An index that is made to find few others as well would miss a third of these."""
    train = [text(n, words=100) for n in range(60)]
    copies = [f"{' '.join(document.split()[:-8])} {text(99, words=8)}" for document in train]
    similarity = (96 - 8) / (96 + 8)  # of 96 shingles each
    assert similarity > 0.84
    _, dropped = without_copies(in_memory([*train, *copies]), in_memory([text(100)]), 0.8)
    assert 0.85 * len(copies) < dropped <= len(copies)


def test_a_threshold_near_one_leaves_out_what_is_the_same():
    train = [text(0), altered(text(0), 100), text(0).upper()]
    kept, dropped = without_copies(in_memory(train), in_memory([text(1)]), 0.999)
    assert dropped == 1 and list(kept) == train[:2]


def test_the_first_of_several_copies_stays_and_places_do_not_move():
    train, held_out = hold_out(in_memory([text(n // 2) for n in range(80)]), 0.1)
    kept, dropped = without_copies(train, held_out, 0.8)
    places = {text: place.total for text, place in kept.read() if text is not None}
    assert len(places) == 80 // 2 - len(list(held_out)) == len(list(kept)) and dropped == len(list(train)) - len(places)
    assert all(train_text not in set(held_out) for train_text in places)
    assert all(places[text(n)] in (2 * n + 1, 2 * n + 2) for n in range(40) if text(n) in places)


def corpus(tmp_path, **changes):
    for number in range(30):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number:02}.txt").write_text(text(number % 20))
    return settings(tmp_path / "cache", source="text", path=str(tmp_path / "text"), vocab_size=280, **changes)


def test_a_prepared_corpus_is_without_copies_and_another_one_than_with_them(tmp_path):
    with_copies = prepare(corpus(tmp_path))  # identical files are one already
    (tmp_path / "text" / "99.txt").write_text(altered(text(5), 100))
    more = prepare(corpus(tmp_path))
    with pytest.warns(DataWarning, match="data.deduplicate: 1 training documents resemble another one to 0.8 or more"):
        without = prepare(corpus(tmp_path, deduplicate=0.8))
    assert without.fingerprint != more.fingerprint
    ends = [(each.train == each.eos_id).sum() for each in (with_copies, more, without)]
    assert ends[1] == ends[0] + 1 and ends[2] == ends[0]
    assert len(list(documents(corpus(tmp_path, deduplicate=0.8), "train"))) == ends[2]


def test_streams_and_machines_without_datasketch_are_refused(tmp_path, monkeypatch):
    streamed = settings(tmp_path, source="c4", max_tokens=10_000, deduplicate=0.8)
    assert checks.problems(streamed) == [
        "data.deduplicate: 0.8 needs all documents at once, and data.source c4 is streamed; use null, or files with "
        "data.source=text"
    ]
    monkeypatch.setattr(deduplication.importlib.util, "find_spec", lambda name: None)
    assert checks.problems(settings(tmp_path, deduplicate=0.8)) == [
        "data.deduplicate: 0.8 needs the package datasketch; pip install '.[dedup]', or use null"
    ]

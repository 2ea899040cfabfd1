"""Documents in a fixed order, readable from any place on; and a fraction of them held out for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

# Below this many documents a fraction of them is too coarse, and the text itself is cut.
MIN_DOCUMENTS_TO_SPLIT = 20


class DataWarning(UserWarning):
    """What was left out of the data, made again or repeated; for the user, not for the programmer."""


class Place(NamedTuple):
    """Where a reading stands: so many whole shards, so many documents of the next one, so many documents in total."""

    shard: int = 0
    within: int = 0
    total: int = 0


START = Place()


@dataclass(frozen=True)
class Documents:
    """Shards that each start a new pass when called; no shard is opened before the one in front of it has ended.

    keep: of the place of a document among all of them, whether it belongs here; None = all do.
    """

    shards: Sequence[Callable[[], Iterator[str]]]
    keep: Callable[[int], bool] | None = None

    def __iter__(self) -> Iterator[str]:
        return (text for text, _ in self.read() if text is not None)

    def read(self, start: Place = START) -> Iterator[tuple[str | None, Place]]:
        """(document, the place after it) from `start` on; (None, …) where a shard has ended, before the next opens."""
        index = start.total
        for number in range(start.shard, len(self.shards)):
            skip = start.within if number == start.shard else 0
            for within, text in enumerate(self.shards[number]()):
                if within < skip:
                    continue
                index += 1
                if self.keep is None or self.keep(index - 1):
                    yield text, Place(number, within + 1, index)
            yield None, Place(number + 1, 0, index)


def in_memory(texts: Sequence[str]) -> Documents:
    """Documents that are at hand."""
    return Documents([partial(iter, texts)])


def hold_out(source: Documents, fraction: float) -> tuple[Documents, Documents]:
    """(train, held out): every 1/fraction-th document is held out; of few documents the last part of the text is."""
    assert source.keep is None
    if _is_small(source, fraction):
        train, held_out = cut(list(source), fraction)
        return in_memory(train), in_memory(held_out)
    return (
        Documents(source.shards, lambda index: not _is_held_out(index, fraction)),
        Documents(source.shards, lambda index: _is_held_out(index, fraction)),
    )


def cut(texts: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Cut the concatenation of `texts` after the line that ends nearest to `1 - fraction` of its characters.

    A text without line ends is cut at a space, one without spaces anywhere. Blank parts are dropped.
    """
    remaining = round(sum(map(len, texts)) * (1 - fraction))
    for index, text in enumerate(texts):
        if remaining < len(text) or index == len(texts) - 1:
            at = _nearest_boundary(text, remaining)
            train, held_out = [*texts[:index], text[:at]], [text[at:], *texts[index + 1 :]]
            return [text for text in train if text.strip()], [text for text in held_out if text.strip()]
        remaining -= len(text)
    return [], []


def _is_small(source: Documents, fraction: float) -> bool:
    """Return whether the documents are too few to hold out whole ones. Reads no more of them than it takes to know."""
    return not any(
        count >= MIN_DOCUMENTS_TO_SPLIT and int(count * fraction) > 0 for count, _ in enumerate(source, start=1)
    )


def _is_held_out(index: int, fraction: float) -> bool:
    return int((index + 1) * fraction) > int(index * fraction)


def _nearest_boundary(text: str, target: int) -> int:
    for separator in ("\n", " "):
        ends = {text.rfind(separator, 0, target) + 1, text.find(separator, target) + 1} - {0, len(text)}
        if ends:
            return min(ends, key=lambda end: (abs(end - target), end))
    return target

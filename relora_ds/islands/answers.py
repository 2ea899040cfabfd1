"""What the link tells an island."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Joined:
    """What an island learns when it joins.

    Attributes:
        decided: the last decided round.
        oldest: the oldest round that can be fetched.
        islands: the names that have joined.
    """

    decided: int
    oldest: int
    islands: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """What a round consists of.

    Attributes:
        round: its number.
        islands: the facts of each island in it, sorted by name.
        missing: the islands that it lacks.
    """

    round: int
    islands: dict[str, dict[str, Any]]
    missing: tuple[str, ...]

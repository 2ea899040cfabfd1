"""What a server must remember when it is killed: the values, and their form in JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Island:
    """What is known of an island.

    Attributes:
        incarnation: of its latest start.
        world_size: its number of ranks.
        keep_from: the oldest round that it may still ask for.
        is_waited_for: it was in the last decided round, or has joined since.
    """

    incarnation: str
    world_size: int
    keep_from: int
    is_waited_for: bool = True


@dataclass
class Contribution:
    """The update of an island for the open round, of which the server has every rank's part."""

    incarnation: str
    facts: dict[str, Any]
    keep_from: int
    size: int


@dataclass
class State:
    """What a server must remember when it is killed.

    Attributes:
        identity: what is the same on all islands, as the first one told it.
        identity_of: the name of that one.
        decided: the last round that was decided; the next one is open.
        has_decided: whether this server has decided a round, or only heard from islands how far they are.
        oldest: the oldest round that is kept.
        islands: by name.
        complete: the contributions to the open round, by island.
    """

    identity: dict[str, Any] = field(default_factory=dict)
    identity_of: str = ""
    decided: int = 0
    has_decided: bool = False
    oldest: int = 1
    islands: dict[str, Island] = field(default_factory=dict)
    complete: dict[str, Contribution] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it in values of JSON."""
        return asdict(self)

    @staticmethod
    def of_json(value: dict[str, Any]) -> State:
        """Return the state that `as_json` made `value` of."""
        islands = {name: Island(**one) for name, one in value["islands"].items()}
        complete = {name: Contribution(**one) for name, one in value["complete"].items()}
        return State(**{**value, "islands": islands, "complete": complete})


@dataclass(frozen=True)
class Part:
    """What one rank says of its part of a contribution.

    Attributes:
        index: the sizes of its blobs in bytes, in the order of their bytes.
        facts: of its island, the same from every rank.
        keep_from: the oldest round that its island may still ask for.
    """

    index: dict[str, int]
    facts: dict[str, Any]
    keep_from: int

    def as_json(self) -> dict[str, Any]:
        """Return it in values of JSON."""
        return asdict(self)

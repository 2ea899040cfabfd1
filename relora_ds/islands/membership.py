"""Which islands there are, and which of them a round consists of: decisions alone, without sockets, files or clocks.

Every method that depends on time gets it as `now`, in seconds of any clock that does not step back.
"""

from __future__ import annotations

import json
from typing import Any

from relora_ds.islands.messages import PROTOCOL
from relora_ds.islands.refusals import LinkRefused
from relora_ds.islands.remembered import Contribution, Island, Part, State

DEFAULT_TIMEOUT_S = 600.0


class Membership:
    """Decide who takes part. The caller writes `state` to the disk before it tells anybody of a change."""

    def __init__(self, state: State, *, timeout_s: float | None, lease_s: float, keep_rounds: int, now: float):
        self.state = state
        self.lease_s = lease_s
        self._timeout_s, self._keep_rounds = timeout_s, keep_rounds
        self._heard: dict[str, float] = {}
        self._started_at = now  # a lease that an earlier server granted may have been renewed just before
        self._begun: dict[str, dict[int, Part]] = {}  # of the open round: island -> rank -> its part
        self._finished: dict[str, set[int]] = {}
        self._first_complete = now

    @property
    def _patience_s(self) -> float:
        """How long a round waits: as the server was told, else as all islands say."""
        if self._timeout_s is not None:
            return self._timeout_s
        return self.state.identity.get("islands.timeout_s", DEFAULT_TIMEOUT_S)

    def join(self, name: str, about: dict[str, Any], now: float) -> bool:
        """Let an island in; `about` has the fields of the message "join".

        Returns:
            False if another incarnation still holds the name.

        Raises:
            LinkRefused: it cannot take part.
        """
        state = self.state
        self._compare(name, about)
        if about["rank"] >= about["world_size"]:
            raise LinkRefused(f"islands: rank {about['rank']} of {name!r} is not one of its {about['world_size']}")
        known = state.islands.get(name)
        if known and known.incarnation == about["incarnation"]:
            if known.world_size != about["world_size"]:
                raise LinkRefused(
                    f"islands: rank {about['rank']} of {name!r} counts {about['world_size']} ranks, another one "
                    f"{known.world_size}; give each island a name of its own"
                )
            self._heard[name] = now
            return True
        if known and now - self._heard.get(name, self._started_at) < self.lease_s:
            return False
        if not known and len(state.islands) >= about["count"]:
            raise LinkRefused(
                f"islands.name: {name!r} is one more than islands.count = {about['count']}: the others are "
                f"{', '.join(sorted(state.islands))}; give it the name of the one that it replaces"
            )
        if about["done"] > state.decided:
            self._continue_after(about["done"], name)
        if not state.identity_of:
            state.identity, state.identity_of = _identity(about), name
        keep_from = min(known.keep_from if known else about["done"] + 1, about["done"] + 1)
        state.islands[name] = Island(about["incarnation"], about["world_size"], keep_from)
        self._heard[name] = now
        self._begun.pop(name, None)
        self._finished.pop(name, None)
        return True

    def silent_s(self, name: str, now: float) -> float | None:
        """Return for how long an island has not been heard of, None if this server never did."""
        return now - self._heard[name] if name in self._heard else None

    def hear(self, name: str, incarnation: str, rank: int, now: float) -> None:
        """Note that an incarnation lives.

        Raises:
            LinkRefused: it is not the one that has joined, or has no such rank.
        """
        island = self.state.islands.get(name)
        if island is None:
            raise LinkRefused(
                f"islands: the server does not know island {name!r}, its directory has been replaced; start the island "
                "again"
            )
        if island.incarnation != incarnation:
            raise LinkRefused(f"islands.name: another process has joined as {name!r} meanwhile; end this one")
        if rank >= island.world_size:
            raise LinkRefused(f"islands: rank {rank} is not one of the {island.world_size} of island {name!r}")
        self._heard[name] = now

    def wants(self, name: str, rank: int, round: int) -> bool:
        """Return whether a part still counts: the first complete contribution to an undecided round does.

        Raises:
            LinkRefused: the round before it is not decided.
        """
        if round > self.state.decided + 1:
            raise LinkRefused(f"round: {round} cannot come before round {self.state.decided + 1}, which is undecided")
        is_decided = round <= self.state.decided
        return not (is_decided or name in self.state.complete or rank in self._finished.get(name, ()))

    def begin(self, name: str, rank: int, part: Part) -> None:
        """Take what a rank says of its part.

        Raises:
            LinkRefused: it contradicts another rank of its island.
        """
        for other, its in self._begun.get(name, {}).items():
            if other != rank and its.facts != part.facts:
                raise LinkRefused(f"facts: {part.facts} on rank {rank} and {its.facts} on rank {other} of {name!r}")
            if other != rank and (twice := part.index.keys() & its.index.keys()):
                raise LinkRefused(f"blobs: ranks {other} and {rank} of {name!r} both send {min(twice)!r}")
        self._begun.setdefault(name, {})[rank] = part

    def finish(self, name: str, rank: int, now: float) -> Contribution | None:
        """Note that the server has a part; returns the island's contribution when it was the last one."""
        finished = self._finished.setdefault(name, set())
        finished.add(rank)
        island, parts = self.state.islands[name], self._begun[name]
        if len(finished) < island.world_size or name in self.state.complete:
            return None
        self._first_complete = self._first_complete if self.state.complete else now
        self.state.complete[name] = Contribution(
            island.incarnation,
            parts[rank].facts,
            min(part.keep_from for part in parts.values()),
            sum(sum(part.index.values()) for part in parts.values()),
        )
        return self.state.complete[name]

    def decide(self, now: float) -> tuple[dict[str, Contribution], list[str]] | None:
        """Close the open round if nobody is waited for any more, or not any longer.

        Returns:
            None, or the contributions that it consists of, sorted by name, and the names of the islands that it lacks.
        """
        state = self.state
        if not state.complete:
            return None
        is_awaited = any(one.is_waited_for and name not in state.complete for name, one in state.islands.items())
        if not state.has_decided:  # islands that have never joined are waited for in the first round
            is_awaited |= len(state.islands) < state.identity["islands.count"]
        if is_awaited and now - self._first_complete < self._patience_s:
            return None
        taken = dict(sorted(state.complete.items()))
        for name, island in state.islands.items():
            island.is_waited_for = name in taken
            island.keep_from = taken[name].keep_from if name in taken else island.keep_from
        self._open(state.decided + 1)
        state.has_decided = True
        needed = min(island.keep_from for island in state.islands.values())
        state.oldest = max(state.oldest, min(needed, state.decided), state.decided + 1 - self._keep_rounds)
        return taken, sorted(state.islands.keys() - taken.keys())

    def _open(self, decided: int) -> None:
        """Open the round after `decided`."""
        self.state.decided, self.state.complete = decided, {}
        self._begun, self._finished = {}, {}

    def _continue_after(self, done: int, name: str) -> None:
        """Continue the count of rounds of islands that an earlier directory of the server has brought to `done`."""
        if self.state.has_decided:
            raise LinkRefused(
                f"islands: {name!r} has applied round {done}, and the server has decided {self.state.decided}; "
                "start the server with the directory that it had, or all islands from checkpoints of one round "
                "and the server with an empty one"
            )
        self._open(done)
        self.state.oldest = done + 1

    def _compare(self, name: str, about: dict[str, Any]) -> None:
        if about["protocol"] != PROTOCOL:
            raise LinkRefused(
                f"islands: {name!r} speaks version {about['protocol']} of the link, and the server {PROTOCOL}; "
                "install the same relora_ds everywhere"
            )
        own, first = _identity(about), self.state.identity
        different = [key for key in sorted(own | first) if _shown(own, key) != _shown(first, key)]
        if self.state.identity_of and different:
            key = different[0]
            raise LinkRefused(
                f"islands: {key} is {_shown(own, key)} here and {_shown(first, key)} on island "
                f"{self.state.identity_of!r}; start all islands with the same recipe, and if it is a new one the "
                "server with an empty directory"
            )


def _identity(about: dict[str, Any]) -> dict[str, Any]:
    return {**about["identity"], "islands.count": about["count"]}


def _shown(identity: dict[str, Any], key: str) -> str:
    """Return the value for people. A missing key counts as null: a later version has it, and left it at its default."""
    return json.dumps(identity.get(key), sort_keys=True)

"""The link of one rank: what the engine calls when a round ends. Every method blocks until the server has answered.

Each of them raises `Stopped` where this rank is asked to stop meanwhile (`stop_when`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import zmq

from relora_ds.islands.address import endpoint
from relora_ds.islands.answers import Decision, Joined
from relora_ds.islands.channel import Channel
from relora_ds.islands.framing import CHUNK, WINDOW
from relora_ds.islands.heartbeat import Heartbeat
from relora_ds.islands.messages import PROTOCOL, is_name
from relora_ds.islands.refusals import LinkRefused
from relora_ds.islands.secret import checked, keys_of
from relora_ds.islands.transfer import Batch, Stream, batches

_WAIT_S = 5.0  # for a decision, until the server says that it is pending
_PINGS = 4  # in the time after which the server takes an island for dead


class Link:
    """The connection of one rank of an island, for one thread.

    Args:
        address: the server's, "tcp://HOST:PORT".
        secret: which the server and all islands share.
        island: the name of the island, the same in each of its starts.
        incarnation: of this start, the same on all ranks, e.g. a UUID.
        rank: of this process in its island.
        world_size: the number of ranks of the island.
        count: how many islands there are.
        timeout_s: how long the server may be silent before LinkError.

    Attributes:
        bytes_sent: of blobs.
        bytes_received: of blobs.

    Raises:
        ValueError: an argument cannot be right. The first method that talks to the server finds a wrong secret.
    """

    def __init__(
        self,
        address: str,
        secret: str,
        *,
        island: str,
        incarnation: str,
        rank: int,
        world_size: int,
        count: int,
        timeout_s: float = 600.0,
    ):
        for field, name in (("islands.name", island), ("incarnation", incarnation)):
            if not is_name(name):
                raise ValueError(f"{field}: {name!r}; use at most 64 of letters, digits, '.', '_' and '-'")
        self.bytes_sent = self.bytes_received = 0
        self._about = {"protocol": PROTOCOL, "world_size": world_size, "count": count}
        self._address, self._keys = endpoint(address, "islands.address"), keys_of(checked(secret, "secret"))
        self._sender = {"island": island, "incarnation": incarnation, "rank": rank}
        self._indexes: dict[tuple[int, str], dict[str, Sequence[int]]] = {}
        self._context = zmq.Context()
        self._channel = Channel(self._context, self._address, self._keys, self._sender, timeout_s)
        self._heartbeat: Heartbeat | None = None

    def stop_when(self, is_asked_to_stop: Callable[[], bool]) -> None:
        """Stop waiting for the server soon after `is_asked_to_stop()` returns True."""
        self._channel.is_asked_to_stop = is_asked_to_stop

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether this rank should not wait any longer."""
        return self._channel.is_asked_to_stop()

    def join(self, identity: dict[str, Any], done: int) -> Joined:
        """Join, or join anew after a restart of this island.

        Args:
            identity: what must be the same on all islands: values of JSON by the keys that a message names.
            done: the last round that this island has applied; 0 for none.

        Raises:
            LinkRefused: another secret, identity or relora_ds; more islands than `count`; another process that lives
                has this name; the server knows of fewer rounds than `done`. LinkError: the server is silent.
        """
        begin = time.monotonic()
        while True:
            reply = self._channel.call("join", identity=identity, done=done, **self._about)
            lease_s = reply.fields["lease_s"]
            if reply.kind == "joined":
                break
            # One that was killed is not heard of any more, and its lease runs out.
            silent_s = reply.fields["silent_s"]
            if silent_s is not None and time.monotonic() - begin - silent_s > lease_s / 2:
                raise LinkRefused(
                    f"islands.name: two islands with one name, {self._sender['island']!r}: another process lives with "
                    "it; give each island a name of its own, or stop the other process"
                )
            time.sleep(lease_s / 20)
        if self._heartbeat is None:
            every_s = lease_s / _PINGS
            self._heartbeat = Heartbeat(self._context, self._address, self._keys, self._sender, every_s)
        return Joined(reply.fields["decided"], reply.fields["oldest"], tuple(reply.fields["islands"]))

    def contribute(
        self, round: int, blobs: Mapping[str, bytes | memoryview], facts: dict[str, Any], keep_from: int
    ) -> None:
        """Send this rank's part of the island's update. It is on the server's disk afterwards, or no longer counts.

        Args:
            round: its number, from 1 on.
            blobs: contiguous bytes by name; the ranks of an island have different names.
            facts: small values of JSON, the same from all ranks of an island; the decision has them.
            keep_from: the oldest round that this island may still ask for.

        Raises:
            LinkRefused: the round before it is not decided, or ranks contradict each other. LinkError: the server is
                silent.
        """
        stream = Stream(blobs)
        while True:
            fields = {"round": round, "index": stream.index, "facts": facts, "keep_from": keep_from}
            reply = self._channel.call("begin", **fields).fields
            if reply["status"] == "done" or self._send_parts(round, stream, reply["have"]):
                return

    def decision(self, round: int) -> Decision | None:
        """Return what a round consists of, as soon as it is decided; None after a few seconds without a decision.

        Raises:
            LinkRefused: the server does not have it any more. LinkError: the server is silent, over several calls.
        """
        reply = self._channel.ask("decision", 2 * _WAIT_S, round=round, wait_s=_WAIT_S)
        if reply is None or reply.kind != "decision":
            return None
        islands = dict(sorted(reply.fields["islands"].items()))
        return Decision(reply.fields["round"], islands, tuple(reply.fields["missing"]))

    def fetch(self, round: int, island: str, names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, memoryview]:
        """Return blobs of an island in a decided round.

        Args:
            round: its number.
            island: one of those in its decision.
            names: which blobs, of any of its ranks.
            sizes: how many bytes each of them must have.

        Raises:
            LinkRefused: a blob is missing or has another size, or the server does not have the round any more.
            LinkError: the server is silent.
        """
        places = self._index(round, island)
        for name in names:
            found = places[name][2] if name in places else None
            if found != sizes[name]:
                has = "lacks it" if found is None else f"has {found} bytes"
                raise LinkRefused(
                    f"{name}: {sizes[name]} bytes are needed, and island {island!r} {has} in round {round}; "
                    "start all islands with the same recipe and the same relora_ds"
                )
        blobs = {name: memoryview(bytearray(sizes[name])) for name in names}
        self._receive(
            round,
            island,
            batches((places[name], blobs[name]) for name in sorted(names, key=lambda name: tuple(places[name]))),
        )
        return blobs

    def agree(self, round: int, digests: Mapping[str, int]) -> None:
        """Compare a checksum of each tensor after a round with those of the other islands.

        Raises:
            LinkRefused: one differs; the message names the first such tensor. LinkError: the server is silent.
        """
        self._channel.call("agree", round=round, digests=dict(digests))

    def close(self) -> None:
        """Close the connections. The server keeps what it has."""
        if self._heartbeat:
            self._heartbeat.stop()
        self._channel.close()
        self._context.term()

    def _send_parts(self, round: int, stream: Stream, have: int) -> bool:
        """Send the bytes that the server does not have; returns False where the part must begin anew."""
        self._channel.begin()
        sent = have
        while True:
            while sent < stream.size and sent - have < WINDOW * CHUNK:
                payload = stream.read(sent, CHUNK)
                self._channel.send("part", {"round": round, "offset": sent}, payload)
                sent += len(payload)
                self.bytes_sent += len(payload)
            reply = self._channel.receive()
            if reply is None or reply.fields["status"] == "begin":
                return False
            if reply.fields["status"] == "done":
                return True
            have = max(have, reply.fields["have"])

    def _index(self, round: int, island: str) -> dict[str, Sequence[int]]:
        if not any(known == round for known, _ in self._indexes):
            self._indexes.clear()
        if (round, island) not in self._indexes:
            self._indexes[round, island] = self._channel.call("index", round=round, of=island).fields["blobs"]
        return self._indexes[round, island]

    def _receive(self, round: int, island: str, wanted) -> None:
        self._channel.begin()
        numbered, pending = enumerate(wanted), dict[int, Batch]()
        while True:
            new = dict(islice(numbered, WINDOW - len(pending)))
            pending |= new
            if not pending:
                return
            self._ask(round, island, new)
            reply = self._channel.receive()
            if reply is None:
                self._ask(round, island, pending)
            elif batch := pending.pop(reply.fields["batch"], None):
                if len(reply.payload) != batch.size:
                    raise LinkRefused(f"islands: {len(reply.payload)} bytes came from the server, not {batch.size}")
                batch.fill(reply.payload)
                self.bytes_received += batch.size

    def _ask(self, round: int, island: str, asked: Mapping[int, Batch]) -> None:
        for number, batch in asked.items():
            fields = {"round": round, "of": island, "batch": number, "ranges": batch.ranges}
            self._channel.send("read", fields)

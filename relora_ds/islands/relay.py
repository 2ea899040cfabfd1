"""Answer the requests of clients. What an answer tells is on the disk before it is returned."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from relora_ds.islands.framing import Message
from relora_ds.islands.membership import Membership
from relora_ds.islands.refusals import LinkRefused
from relora_ds.islands.remembered import Contribution, Part
from relora_ds.islands.rounds import Rounds
from relora_ds.islands.upload import Upload
from relora_ds.utils.text import human_bytes


class Relay:
    """What a server does with a message, without its sockets.

    Args:
        rounds: its directory.
        timeout_s: how long a round waits for islands after the first complete contribution; None: as they say.
        lease_s: how long a name belongs to an incarnation that is not heard of.
        keep_rounds: how many decided rounds are kept at most.
        now: seconds of the clock whose later values `answer` and `decide` get.
        say: prints a line.
    """

    def __init__(
        self,
        rounds: Rounds,
        *,
        timeout_s: float | None,
        lease_s: float,
        keep_rounds: int,
        now: float,
        say: Callable[[str], None],
    ):
        self._rounds, self._say = rounds, say
        self._members = Membership(
            rounds.load(), timeout_s=timeout_s, lease_s=lease_s, keep_rounds=keep_rounds, now=now
        )
        self._uploads: dict[tuple[str, int], Upload] = {}
        self._handlers: dict[str, Callable[[dict, bytes, float], Message | None]] = {
            "ping": lambda fields, _, now: None,
            "begin": self._begin,
            "part": self._part,
            "decision": self._decision,
            "index": self._index,
            "read": self._read,
            "agree": self._agree,
        }
        self._take_parts_of_the_disk(now)

    @property
    def decided(self) -> int:
        """The last round that is decided."""
        return self._members.state.decided

    def answer(self, request: Message, now: float) -> Message | None:
        """Return the reply to a request, None to a ping. Of a decision that is not made yet it is "pending".

        Raises:
            OSError: what the reply would tell cannot be written.
        """
        fields, oldest = request.fields, self._members.state.oldest
        reply: Message | None
        try:
            if request.kind == "join":
                reply = self._join(fields, now)
            else:
                self._members.hear(fields["island"], fields["incarnation"], fields["rank"], now)
                reply = self._handlers[request.kind](fields, request.payload, now)
        except LinkRefused as refused:
            reply = None if request.kind == "ping" else Message("error", {"text": str(refused)[:4096]})
        self._rounds.save(self._members.state)
        self._remove_rounds(oldest)
        return reply and Message(reply.kind, {"id": fields["id"], **reply.fields}, reply.payload)

    def decide(self, now: float) -> None:
        """Decide the open round if it is time to.

        Raises:
            OSError: the decision cannot be written.
        """
        state, oldest = self._members.state, self._members.state.oldest
        decided = self._members.decide(now)
        if decided is None:
            return
        taken, missing = decided
        decision = {
            "time": time.time(),
            "round": state.decided,
            "islands": {name: one.facts for name, one in taken.items()},
            "missing": missing,
            "bytes": sum(one.size for one in taken.values()),
        }
        incarnations = {name: one.incarnation for name, one in taken.items()}
        self._rounds.write_decision(decision, incarnations)
        self._rounds.save(state)
        self._say(f"round {state.decided}: decided with {', '.join(taken)}")
        if missing:
            self._say(f"round {state.decided}: missing {', '.join(missing)}")
        self._close_uploads()
        self._rounds.drop_others(state.decided, incarnations)
        self._remove_rounds(oldest)

    def close(self) -> None:
        """Close the files of parts that have not arrived."""
        self._close_uploads()

    def _join(self, fields: dict[str, Any], now: float) -> Message:
        name, state = fields["island"], self._members.state
        before, decided = state.islands.get(name), state.decided
        if not self._members.join(name, fields, now):
            silent_s = self._members.silent_s(name, now)
            return Message("held", {"lease_s": self._members.lease_s, "silent_s": silent_s})
        if state.islands[name] is not before:
            self._close_uploads(None if state.decided != decided else name)
            ranks = f"{fields['world_size']} rank{'s' if fields['world_size'] > 1 else ''}"
            self._say(f"island {name}: joined with {ranks}, has applied round {fields['done']} of {state.decided}")
        return Message(
            "joined",
            {
                "decided": state.decided,
                "oldest": state.oldest,
                "islands": sorted(state.islands),
                "lease_s": self._members.lease_s,
            },
        )

    def _begin(self, fields: dict[str, Any], _: bytes, now: float) -> Message:
        name, rank, round = fields["island"], fields["rank"], fields["round"]
        if not self._members.wants(name, rank, round):
            return _upload("done")
        part = Part(fields["index"], fields["facts"], fields["keep_from"])
        self._members.begin(name, rank, part)
        upload = self._uploads.get((name, rank))
        if upload is None or upload.part != part:
            if upload:
                upload.close()
            upload = Upload(self._rounds.stem(round, name, fields["incarnation"], rank), part)
            self._uploads[name, rank] = upload
        return self._after_bytes(fields, upload, now)

    def _part(self, fields: dict[str, Any], payload: bytes, now: float) -> Message:
        name, rank = fields["island"], fields["rank"]
        if not self._members.wants(name, rank, fields["round"]):
            return _upload("done")
        upload = self._uploads.get((name, rank))
        if upload is None or not upload.write(fields["offset"], payload):
            return _upload("begin")
        return self._after_bytes(fields, upload, now)

    def _after_bytes(self, fields: dict[str, Any], upload: Upload, now: float) -> Message:
        if not upload.is_whole:
            return _upload("send", upload.have)
        name, rank = fields["island"], fields["rank"]
        upload.finish()
        del self._uploads[name, rank]
        self._say_complete(name, self._members.finish(name, rank, now))
        return _upload("done", upload.have)

    def _decision(self, fields: dict[str, Any], _: bytes, now: float) -> Message:
        round = fields["round"]
        if round == self.decided + 1:
            return Message("pending", {})
        self._check_kept(round)
        decision = self._rounds.decision(round)
        return Message("decision", {name: decision[name] for name in ("round", "islands", "missing")})

    def _index(self, fields: dict[str, Any], _: bytes, now: float) -> Message:
        self._check_kept(fields["round"])
        return Message("index", {"blobs": self._rounds.index(fields["round"], fields["of"])})

    def _read(self, fields: dict[str, Any], _: bytes, now: float) -> Message:
        self._check_kept(fields["round"])
        data = self._rounds.read(fields["round"], fields["of"], fields["ranges"])
        return Message("blobs", {"batch": fields["batch"]}, data)

    def _agree(self, fields: dict[str, Any], _: bytes, now: float) -> Message:
        self._check_kept(fields["round"])
        if differs := self._rounds.agree(fields["round"], fields["digests"]):
            name, kept = differs
            raise LinkRefused(
                f"islands: after round {fields['round']} the checksum of {name} is {fields['digests'][name]} on "
                f"{fields['island']!r} and {kept} on the island that told it first; the islands train different "
                "models from here on: copy a checkpoint of another island to this one, and start it again"
            )
        return Message("agreed", {})

    def _check_kept(self, round: int) -> None:
        state = self._members.state
        if round > state.decided:
            raise LinkRefused(f"round: {round} is not decided; the last decided one is {state.decided}")
        if round < state.oldest:
            raise LinkRefused(
                f"round: the server does not have {round} any more, only those from {state.oldest} on; copy a "
                "checkpoint of another island to this one, and start it again"
            )

    def _take_parts_of_the_disk(self, now: float) -> None:
        """Continue with the open round where a killed server was."""
        state = self._members.state
        for name, island in state.islands.items():
            if name not in state.complete:
                for rank, part in self._rounds.parts(state.decided + 1, name, island.incarnation).items():
                    self._members.begin(name, rank, part)
                    self._say_complete(name, self._members.finish(name, rank, now))
        self._rounds.save(state)

    def _say_complete(self, name: str, contribution: Contribution | None) -> None:
        if contribution:
            size = human_bytes(contribution.size)
            self._say(f"round {self.decided + 1}: island {name} is complete, {size}")

    def _close_uploads(self, island: str | None = None) -> None:
        for key in [key for key in self._uploads if island in (None, key[0])]:
            self._uploads.pop(key).close()

    def _remove_rounds(self, oldest_before: int) -> None:
        if self._members.state.oldest != oldest_before:
            for round in self._rounds.remove_before(self._members.state.oldest):
                self._say(f"round {round}: removed")


def _upload(status: str, have: int = 0) -> Message:
    return Message("upload", {"status": status, "have": have})

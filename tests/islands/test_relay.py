"""What the server answers, and that it is on the disk before: without sockets, with a crash at each write."""

import json
import os
from functools import partial

import pytest

from relora_ds.islands.framing import Message
from relora_ds.islands.messages import PROTOCOL
from relora_ds.islands.relay import Relay
from relora_ds.islands.rounds import Rounds
from relora_ds.utils import files
from tests.islands.servers import is_open

WORLD_SIZES = {"a": 2, "b": 1}
WRITES = ("write_json", "write_text", "sync")


class CrashError(Exception):
    """The server dies here."""


class Desk:
    """A relay that is made anew from its directory after a crash, and asked the same again."""

    def __init__(self, directory):
        self.directory, self.lines, self.now, self._rounds = directory, [], 0.0, None
        self._while_it_starts()

    def open(self):
        if self._rounds:
            self._rounds.close()
        self._rounds = Rounds(self.directory)
        options = {"timeout_s": 60.0, "lease_s": 20.0, "keep_rounds": 200}
        self.relay = Relay(self._rounds, **options, now=self.now, say=self.lines.append)

    def ask(self, kind, island="a", rank=0, payload=b"", **fields):
        sender = {"id": 1, "island": island, "incarnation": f"{island}1", "rank": rank}
        reply = self._until_it_works(lambda: self.relay.answer(Message(kind, {**sender, **fields}, payload), self.now))
        self._until_it_works(lambda: self.relay.decide(self.now))
        return reply and Message(reply.kind, {k: v for k, v in reply.fields.items() if k != "id"}, reply.payload)

    def join(self, island, rank):
        about = {"protocol": PROTOCOL, "world_size": WORLD_SIZES[island], "count": 2, "identity": {}, "done": 0}
        assert self.ask("join", island, rank, **about).kind == "joined"

    def contribute(self, round, island, rank, facts):
        data = f"{round} {island} {rank}".encode()
        begin = {"round": round, "index": {f"w{rank}": len(data)}, "facts": facts, "keep_from": 1}
        while self.ask("begin", island, rank, **begin).fields["status"] == "send":
            reply = self.ask("part", island, rank, data, round=round, offset=0)
            assert reply.kind == "upload" and reply.fields["status"] in ("begin", "done")

    def _until_it_works(self, act):
        while True:
            try:
                return act()
            except CrashError:
                self.relay.close()
                self._while_it_starts()

    def _while_it_starts(self):
        while True:
            try:
                return self.open()
            except CrashError:
                pass


def two_rounds(desk):
    """Every answer that an island gets, where each decision must stay what it was when it was told first."""
    for island, ranks in WORLD_SIZES.items():
        for rank in range(ranks):
            desk.join(island, rank)
    told = {}
    for round in (1, 2):
        assert desk.ask("decision", round=round, wait_s=0).kind == "pending"
        for island, ranks in WORLD_SIZES.items():
            for rank in range(ranks):
                desk.contribute(round, island, rank, {"round": round})
        told[round] = desk.ask("decision", round=round, wait_s=0).fields
        for earlier in told:
            assert desk.ask("decision", round=earlier, wait_s=0).fields == told[earlier]
        index = desk.ask("index", round=round, of="a").fields["blobs"]
        assert index == {"w0": (0, 0, 5), "w1": (1, 0, 5)}
        ranges = [*index.values()]
        assert desk.ask("read", round=round, of="a", batch=3, ranges=ranges).payload == b"%d a 0%d a 1" % (round, round)
        assert desk.ask("agree", round=round, digests={"w0": round}).kind == "agreed"
        assert desk.ask("agree", "b", round=round, digests={"w0": 9}).kind == "error"
    return told


def crash_at(monkeypatch, number, is_after):
    """Let the write with this number raise, before it or after it."""
    count = 0
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a process dies here, not the machine

    def crashing(write, *arguments):
        nonlocal count
        count += 1
        if count == number and not is_after:
            raise CrashError
        write(*arguments)
        if count == number and is_after:
            raise CrashError

    for name in WRITES:
        monkeypatch.setattr(files, name, partial(crashing, getattr(files, name)))
    return lambda: count


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_crash_at_any_write_changes_no_answer(tmp_path, every, is_after):
    expected = two_rounds(Desk(tmp_path / "uninterrupted"))
    assert [*expected[2]["islands"]] == ["a", "b"]
    number, count = 1, 1
    while number <= count:
        with pytest.MonkeyPatch.context() as monkeypatch:
            writes = crash_at(monkeypatch, number, is_after)
            desk = Desk(tmp_path / str(number))
            assert two_rounds(desk) == expected, f"write {number}"
            count = writes()
        lines = (desk.directory / "history.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == [1, 2], f"write {number}"
        number += every
    assert count > 50


def test_what_an_answer_tells_is_on_the_disk(tmp_path):
    """A state that was not written is not told: the answer does not come."""
    desk = Desk(tmp_path)
    for island, rank in (("a", 0), ("a", 1), ("b", 0)):
        desk.join(island, rank)
        assert island in json.loads((tmp_path / "state.json").read_text())["islands"]
    for rank in (0, 1):
        desk.contribute(1, "a", rank, {})
    assert [*json.loads((tmp_path / "state.json").read_text())["complete"]] == ["a"]
    desk.contribute(1, "b", 0, {})
    assert desk.ask("decision", round=1, wait_s=0).kind == "decision"
    assert json.loads((tmp_path / "state.json").read_text())["decided"] == 1


def test_bytes_count_once_and_in_order(tmp_path):
    desk = Desk(tmp_path)
    desk.join("b", 0)
    begin = {"round": 1, "index": {"w": 6}, "facts": {}, "keep_from": 1}
    assert desk.ask("part", "b", round=1, offset=0, payload=b"abc").fields["status"] == "begin"
    assert desk.ask("begin", "b", **begin).fields == {"status": "send", "have": 0}
    assert desk.ask("part", "b", round=1, offset=3, payload=b"def").fields["status"] == "begin"
    for _ in range(2):
        assert desk.ask("part", "b", round=1, offset=0, payload=b"abc").fields == {"status": "send", "have": 3}
    assert desk.ask("begin", "b", **begin).fields == {"status": "send", "have": 3}
    error = desk.ask("part", "b", round=1, offset=3, payload=b"defg").fields["text"]
    assert error == "part: it ends at byte 7, the index at 6"
    assert desk.ask("part", "b", round=1, offset=3, payload=b"def").fields == {"status": "done", "have": 6}
    assert desk.ask("part", "b", round=1, offset=3, payload=b"xyz").fields["status"] == "done"
    desk.now = 61.0
    desk.relay.decide(desk.now)
    assert desk.ask("read", "b", round=1, of="b", batch=0, ranges=[(0, 0, 6)]).payload == b"abcdef"
    assert (
        "rank 0 of 'b' has no bytes 4 to 8"
        in desk.ask("read", "b", round=1, of="b", batch=0, ranges=[(0, 4, 4)]).fields["text"]
    )
    assert (
        "rank 5 of 'b' has no bytes"
        in desk.ask("read", "b", round=1, of="b", batch=0, ranges=[(5, 0, 1)]).fields["text"]
    )


def test_unfinished_parts_do_not_outlive_the_decision(tmp_path):
    desk = Desk(tmp_path)
    for island, rank in (("a", 0), ("b", 0)):
        desk.join(island, rank)
    desk.contribute(1, "b", 0, {})
    desk.ask("begin", "a", 0, round=1, index={"w0": 4}, facts={}, keep_from=1)
    part = tmp_path / "rounds/00000001/a/a1/00000.part"
    assert is_open(part)
    desk.now = 60.0
    assert desk.ask("decision", round=1, wait_s=0).kind == "pending"
    assert desk.ask("decision", round=1, wait_s=0).fields["missing"] == ["a"]
    assert not is_open(part) and not part.exists()


def test_a_damaged_state_is_named(tmp_path):
    Desk(tmp_path)._rounds.close()
    (tmp_path / "state.json").write_text('{"islands": 3}')
    with pytest.raises(ValueError, match=r"state.json: it is not what a server writes .*; use another directory"):
        Desk(tmp_path)

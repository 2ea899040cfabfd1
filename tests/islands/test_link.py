"""A server and islands that talk to it."""

import time

import pytest

from relora_ds.islands import channel, client
from relora_ds.islands.framing import CHUNK
from relora_ds.islands.refusals import LinkError, LinkRefused, Stopped
from relora_ds.utils.ports import free_port
from tests.islands.servers import IDENTITY, SECRET, blob, joined, link, run_together, serving


@pytest.fixture
def served(tmp_path):
    with serving(tmp_path / "rounds") as served:
        yield served


def test_rounds_of_islands_with_several_ranks(served, tmp_path):
    """Blobs of all sizes, some larger than a message, none, and of each rank."""
    sizes = {"a": [{"w": 3 * CHUNK + 5, "empty": 0}, {}], "b": [{"w": 1, "v": CHUNK}]}

    def run(island, rank):
        one = link(served.address, island, rank=rank, world_size=len(sizes[island]))
        assert one.join(IDENTITY, 0).decided == 0
        found = []
        for round in (1, 2):
            mine = {f"{name}.{rank}": blob(size, round, island) for name, size in sizes[island][rank].items()}
            one.contribute(round, mine, {"tokens": round * len(sizes[island])}, round)
            found.append(decision := one.decision(round))
            for other in decision.islands:
                wanted = {f"{name}.{r}": size for r, its in enumerate(sizes[other]) for name, size in its.items()}
                blobs = one.fetch(round, other, [*wanted], wanted)
                assert {name: bytes(one) for name, one in blobs.items()} == {
                    name: blob(size, round, other) for name, size in wanted.items()
                }
            one.agree(round, {f"w.{rank}": 17})
        sent = one.bytes_sent, one.bytes_received
        one.close()
        return found, sent

    (a0, sent), (a1, nothing), (b, _) = run_together(lambda: run("a", 0), lambda: run("a", 1), lambda: run("b", 0))
    assert a0 == a1 == b and [one.round for one in a0] == [1, 2]
    assert a0[0].islands == {"a": {"tokens": 2}, "b": {"tokens": 1}} and a0[0].missing == ()
    assert sent == (2 * (3 * CHUNK + 5), 2 * (3 * CHUNK + 5 + CHUNK + 1)) and nothing == (0, sent[1])
    assert {"round 1: decided with a, b", "round 2: decided with a, b", "round 1: removed"} <= {*served.lines}
    assert "round 1: island a is complete, 3.15 MB" in served.lines


def test_names_that_an_island_joins(served):
    with joined(served.address, "b"):
        one = link(served.address, "a")
        assert one.join(IDENTITY, 0).islands == ("a", "b")
        one.close()


def test_a_decision_without_a_late_island_which_replays_it(tmp_path):
    with serving(tmp_path, timeout_s=0.3) as served, joined(served.address, "a", "b") as (a, b):
        a.contribute(1, {"w": b"of a"}, {}, 1)
        decision = b.decision(1)
        assert [*decision.islands] == ["a"] and decision.missing == ("b",)
        b.contribute(1, {"w": b"late"}, {}, 1)  # no longer counts
        with pytest.raises(LinkRefused, match="island: 'b' is not in round 1, which has a"):
            a.fetch(1, "b", ["w"], {"w": 4})
        assert bytes(b.fetch(1, "a", ["w"], {"w": 4})["w"]) == b"of a"
        assert "round 1: missing b" in served.lines


def test_an_island_that_was_killed_comes_back_with_an_older_checkpoint(tmp_path):
    with serving(tmp_path, timeout_s=1.0) as served, joined(served.address, "a") as (a,):
        with joined(served.address, "b") as (b,):
            for one in (a, b):
                one.contribute(1, {"w": b"of one"}, {}, 1)
            assert [*a.decision(1).islands] == ["a", "b"]
        for round in (2, 3):
            a.contribute(round, {"w": bytes([round])}, {}, round)
            assert a.decision(round).missing == ("b",)
        begin = time.monotonic()
        with joined(served.address, "b", incarnation="b-2", done=1) as (b,):
            assert time.monotonic() - begin < 5
            for round in (2, 3):
                assert [*b.decision(round).islands] == ["a"]
                assert bytes(b.fetch(round, "a", ["w"], {"w": 1})["w"]) == bytes([round])
            for one in (a, b):
                one.contribute(4, {"w": b"of both"}, {}, 4)
            assert [*a.decision(4).islands] == ["a", "b"]


def test_rounds_that_nobody_needs_are_removed(served, tmp_path):
    with joined(served.address, "a", "b") as (a, b):
        for round in (1, 2, 3):
            a.contribute(round, {"w": b"a"}, {}, round)
            b.contribute(round, {"w": b"b"}, {}, 2)
            a.decision(round)
        kept = sorted(path.name for path in (tmp_path / "rounds" / "rounds").iterdir())
        assert kept == ["00000002", "00000003"] and "round 1: removed" in served.lines
        for call in (lambda: a.decision(1), lambda: a.fetch(1, "b", ["w"], {"w": 1}), lambda: a.agree(1, {})):
            with pytest.raises(LinkRefused, match="does not have 1 any more, only those from 2 on; copy a checkpoint"):
                call()


def test_sizes_are_checked_before_blobs_are_taken(served):
    with joined(served.address, "a", count=1) as (a,):
        a.contribute(1, {"w": b"1234"}, {}, 1)
        a.decision(1)
        with pytest.raises(LinkRefused, match="w: 8 bytes are needed, and island 'a' has 4 bytes in round 1"):
            a.fetch(1, "a", ["w"], {"w": 8})
        with pytest.raises(LinkRefused, match="v: 8 bytes are needed, and island 'a' lacks it in round 1"):
            a.fetch(1, "a", ["v"], {"v": 8})
        assert a.bytes_received == 0


def test_islands_that_differ_after_a_round_are_told_the_tensor(served):
    with joined(served.address, "a", "b") as (a, b):
        for one in (a, b):
            one.contribute(1, {}, {}, 1)
        a.decision(1)
        a.agree(1, {"w": 1, "v": 2})
        b.agree(1, {"v": 2, "u": 3})
        a.agree(1, {"u": 3})
        with pytest.raises(LinkRefused, match="after round 1 the checksum of v is 5 on 'b' and 2 on the island"):
            b.agree(1, {"w": 1, "v": 5, "x": 0})
        with pytest.raises(LinkRefused, match="round: 2 is not decided"):
            a.agree(2, {})


def test_two_islands_with_one_name(served):
    with joined(served.address, "a"):
        one = link(served.address, "a", incarnation="a-2")
        with pytest.raises(LinkRefused, match="islands.name: two islands with one name, 'a'"):
            one.join(IDENTITY, 0)
        one.close()


def test_a_name_of_a_dead_island_becomes_free_also_when_the_server_was_down_meanwhile(tmp_path):
    with serving(tmp_path) as served, joined(served.address, "a"):
        pass
    one = link(served.address, "a", incarnation="a-2")

    def serve():
        time.sleep(1.5)  # more than half of the lease
        with serving(tmp_path, listen=served.address):
            time.sleep(5)

    _, found = run_together(serve, lambda: one.join(IDENTITY, 0))
    assert found.islands == ("a",)
    one.close()


def test_other_recipes_are_refused(served):
    with joined(served.address, "a"):
        one = link(served.address, "b")
        with pytest.raises(LinkRefused, match="islands: relora.r is 16 here and 8 on island 'a'; start all islands"):
            one.join({**IDENTITY, "relora.r": 16}, 0)
        assert one.join(IDENTITY, 0).islands == ("a", "b")
        one.close()


def test_an_incarnation_that_was_replaced_is_told(tmp_path):
    with (
        serving(tmp_path, lease_s=0.0) as served,
        joined(served.address, "a") as (a,),
        joined(served.address, "a", incarnation="a-2"),
        pytest.raises(LinkRefused, match="another process has joined as 'a' meanwhile; end this one"),
    ):
        a.contribute(1, {}, {}, 1)


def test_a_server_that_is_not_there(tmp_path):
    one = link(f"127.0.0.1:{free_port()}", "a", timeout_s=0.5)
    with pytest.raises(LinkError, match=r"nobody has answered at tcp://127.0.0.1:\d+ for \d s; start the server"):
        one.join(IDENTITY, 0)
    one.close()


def test_a_server_that_falls_silent_is_waited_for_over_several_calls(tmp_path, monkeypatch):
    """Between the calls an island can be stopped. A reply to an earlier call is not lost."""
    monkeypatch.setattr(client, "_WAIT_S", 0.1)
    with serving(tmp_path) as served, joined(served.address, "a", count=1, timeout_s=4) as (a,):
        a.contribute(1, {}, {}, 1)
        served.stop()
        assert a.decision(1) is None
        with serving(tmp_path, listen=served.address):
            while (decision := a.decision(1)) is None:
                pass
        assert [*decision.islands] == ["a"]
        begun, silent = time.monotonic(), 0
        with pytest.raises(LinkError, match=r"nobody has answered at tcp://127.0.0.1:\d+ for \d s"):
            while a.decision(1) is None:
                silent += 1
        assert silent > 1 and 4 < time.monotonic() - begun < 30


@pytest.mark.parametrize("what", ["contribute", "fetch"])
def test_one_that_is_asked_to_stop_waits_only_so_much_longer(served, monkeypatch, what):
    monkeypatch.setattr(client, "WINDOW", 1)
    size = 3 * CHUNK
    with joined(served.address, "a", count=1) as (one,):
        one.stop_when(lambda: True)
        if what == "fetch":
            one.contribute(1, {"w": bytes(size)}, {}, 1)  # which ends before it loses patience
        monkeypatch.setattr(channel, "PATIENCE_S", 0.0)
        with pytest.raises(Stopped, match=f"asked to stop, and gave up waiting for {served.address}"):
            if what == "fetch":
                one.fetch(1, "a", ["w"], {"w": size})
            else:
                one.contribute(1, {"w": bytes(size)}, {}, 1)


def test_an_empty_directory_does_not_know_the_islands(tmp_path):
    with serving(tmp_path / "1") as served, joined(served.address, "a") as (a,):
        served.stop()
        with serving(tmp_path / "2", listen=served.address):
            with pytest.raises(LinkRefused, match="does not know island 'a', its directory has been replaced"):
                a.contribute(1, {}, {}, 1)
            with joined(served.address, "b", done=5) as (b,):
                b.contribute(6, {}, {}, 6)


def test_one_server_has_a_directory(tmp_path):
    with (
        serving(tmp_path),
        pytest.raises(ValueError, match="is used by another server; stop that one"),
        serving(tmp_path),
    ):
        pass
    with serving(tmp_path):
        pass


def test_an_address_that_is_taken(served, tmp_path):
    with (
        pytest.raises(OSError, match="--listen: .*; take another address or port"),
        serving(tmp_path / "2", listen=served.address),
    ):
        pass
    with serving(tmp_path / "2"):  # its directory is free
        pass


@pytest.mark.parametrize("change", [{"island": "a b"}, {"incarnation": ""}, {"secret": "short"}])
def test_arguments_are_checked(change):
    arguments = {"island": "a", "secret": SECRET, **change}
    with pytest.raises(ValueError, match="islands.name: 'a b'; use|incarnation: ''; use|secret: 5 characters"):
        link("127.0.0.1:5555", **arguments)

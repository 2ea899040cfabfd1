"""Who does not know the secret, and what those who know it cannot do."""

import json
import pickle
import socket
import time
from pathlib import Path

import pytest
import zmq

from relora_ds.islands.framing import CHUNK, MAX_FRAME
from relora_ds.islands.refusals import LinkRefused
from relora_ds.islands.secret import VARIABLE, keys_of
from relora_ds.islands.sockets import client_socket
from tests.islands.servers import IDENTITY, SECRET, blob, joined, link, serving

REFUSED = "the handshake failed, another secret or no client of the islands"


@pytest.fixture
def served(tmp_path):
    with serving(tmp_path) as served:
        yield served


@pytest.fixture
def context():
    context = zmq.Context()
    context.linger = 0  # of its sockets: what strangers have sent is never taken
    yield context
    context.destroy(linger=0)


def wait_for(what, seconds=20.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def a_round_works(served, round=1):
    with joined(served.address, "a", "b") as (a, b):
        data = blob(2 * CHUNK, round)
        for one in (a, b):
            one.contribute(round, {"w": data}, {}, round)
        assert b.decision(round).missing == ()
        assert bytes(b.fetch(round, "a", ["w"], {"w": len(data)})["w"]) == data


def test_another_secret_is_an_error_at_once(served):
    one = link(served.address, "a", secret="another secret for tests")
    begin = time.monotonic()
    with pytest.raises(
        LinkRefused, match=f"{VARIABLE}: the handshake with {served.address} failed, so the server"
    ) as error:
        one.join(IDENTITY, 0)
    assert time.monotonic() - begin < 20 and "for tests" not in str(error.value)
    one.close()
    wait_for(lambda: any(REFUSED in line for line in served.lines))
    a_round_works(served)


def test_who_knows_the_servers_key_but_not_the_secret_is_refused(served, context):
    """The public key alone, which anyone may learn, admits nobody."""
    one = context.socket(zmq.DEALER)
    one.curve_serverkey = keys_of(SECRET).public
    one.curve_publickey, one.curve_secretkey = zmq.curve_keypair()
    monitor = one.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED)
    one.connect(served.address)
    one.send(b"{}")
    assert monitor.poll(20_000)
    event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
    assert event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    one.disable_monitor()
    wait_for(lambda: any(REFUSED in line for line in served.lines))
    assert not any("malformed" in line for line in served.lines), "its message was read"
    a_round_works(served)


@pytest.mark.parametrize("mechanism", ["null", "plain"])
def test_who_does_not_encrypt_is_refused(served, context, mechanism):
    one = context.socket(zmq.DEALER)
    if mechanism == "plain":
        one.plain_username, one.plain_password = b"a", SECRET.encode()
    one.connect(served.address)
    one.send(b"{}")
    wait_for(lambda: any(REFUSED in line for line in served.lines))
    assert not any("malformed" in line for line in served.lines), "its message was read"


def test_bytes_of_strangers_are_ignored_while_it_works(served, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    host, _, port = served.address.removeprefix("tcp://").rpartition(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47)
    garbage = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        pickle.dumps(Evil()),
        blob(100_000, "garbage"),
        b"\x01\x00" * 10,  # ZMTP 1
        greeting,  # and nothing after it
        greeting + b"\x04\xff" + b"\x05HELLO" + blob(5000, "hello"),
        b"",
    ]
    connections = []
    for number, data in enumerate(garbage, 1):
        connections.append(socket.create_connection((host, int(port))))
        connections[-1].sendall(data)
        if number % 3 == 0:
            a_round_works(served, number // 3)
    for one in connections:
        one.close()
    wait_for(lambda: any(REFUSED in line for line in served.lines))
    assert not (tmp_path / "executed").exists()
    assert not any("malformed" in line for line in served.lines)


def test_members_that_send_what_is_no_message_stop_nobody(served, context, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    one = client_socket(context, keys_of(SECRET), served.address)
    one.connect(served.address)
    sender = {"island": "a", "incarnation": "x", "rank": 0}
    for frames in ([pickle.dumps(Evil())], [b""], [b"{}"] * 9, [b"[" * 1_000_000], [b'{"kind": "ping"}']):
        one.send_multipart(frames)
    for fields, text in [
        ({"kind": "eval", "code": "1"}, "kind: 'eval' is unknown"),
        ({"kind": "part", **sender, "round": 1, "offset": -1}, "offset = -1 is not allowed"),
        ({"kind": "ping", **sender, "island": "../../etc"}, "island = '../../etc' is not allowed"),
        ({"kind": "decision", **sender, "round": 1, "wait_s": 1}, "does not know island 'a'"),
    ]:
        one.send(json.dumps({"id": 3, **fields}).encode())
        reply = json.loads(one.recv())
        assert reply["kind"] == "error" and reply["id"] == 3 and text in reply["text"]
    assert sum("ignored a malformed message" in line for line in served.lines) == 8
    assert not (tmp_path / "executed").exists()
    a_round_works(served)


def test_a_member_cannot_send_a_frame_that_is_too_large(served, context):
    one = client_socket(context, keys_of(SECRET), served.address)
    monitor = one.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    one.connect(served.address)
    one.send(bytes(MAX_FRAME + 2048))
    assert monitor.poll(20_000), "the server has not closed the connection"
    one.disable_monitor()
    assert not any("malformed" in line for line in served.lines), "it was read"
    a_round_works(served)

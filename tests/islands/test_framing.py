"""What a message may hold."""

import json

import pytest

from relora_ds.islands.address import endpoint
from relora_ds.islands.framing import CHUNK, MalformedError, Message, pack, unpack
from relora_ds.islands.messages import REPLIES, REQUESTS
from relora_ds.islands.secret import VARIABLE, read_secret
from relora_ds.islands.transfer import Stream, batches

SENDER = {"id": 7, "island": "a", "incarnation": "x", "rank": 0}
GOOD = {
    "begin": {"round": 1, "index": {"w": 4}, "facts": {"rho": 0.5}, "keep_from": 1},
    "part": {"round": 1, "offset": 0},
    "decision": {"round": 1, "wait_s": 10.0},
    "read": {"round": 1, "of": "a", "batch": 0, "ranges": [[0, 0, 4]]},
    "agree": {"round": 1, "digests": {"w": 1 << 64}},
}


def header(kind, **fields):
    return json.dumps({"kind": kind, **SENDER, **GOOD[kind], **fields}).encode()


@pytest.mark.parametrize("kind", GOOD)
def test_a_message_arrives_as_it_was_sent(kind):
    message = Message(kind, {**SENDER, **GOOD[kind]}, b"blob" if kind == "part" else b"")
    assert unpack(pack(message), REQUESTS) == message


@pytest.mark.parametrize(
    ("frames", "what"),
    [
        ([], "one or two frames, not 0"),
        ([b"{}"] * 3, "one or two frames, not 3"),
        ([b"\x80\x04K\x01."], "not JSON"),
        ([b"[" * 100_000], "not JSON"),
        ([b"9" * 10_000], "not JSON"),
        ([b"[1]"], "not a JSON object"),
        ([b'{"id": 7}'], "kind: None is unknown"),
        ([b'{"kind": ["ping"]}'], "is unknown"),
        ([header("part").replace(b'"part"', b'"eval"')], "kind: 'eval' is unknown"),
        ([header("part", code="x")], "part: the field code is unknown"),
        ([header("part").replace(b'"offset": 0, ', b"").replace(b', "offset": 0', b"")], "field offset is missing"),
        ([header("part", offset=-1)], "offset = -1 is not allowed"),
        ([header("part", offset=1.0)], "offset = 1.0 is not allowed"),
        ([header("part", offset=True)], "offset = True is not allowed"),
        ([header("part", island="../a")], "island = '../a' is not allowed"),
        ([header("part", incarnation="")], "incarnation = '' is not allowed"),
        ([header("part", island="a\n")], "is not allowed"),
        ([header("part"), b"x" * (CHUNK + 1)], "bytes of blobs are too many"),
        ([header("begin", index={"w": -4})], "index = {'w': -4} is not allowed"),
        ([header("begin", index=["w"])], "is not allowed"),
        ([header("begin", facts={"rho": float("nan")})], "not JSON"),
        ([header("begin").replace(b"0.5", b"1e999")], "not JSON"),
        ([header("begin", facts={"text": "x" * 70_000})], "is not allowed"),
        ([header("begin").replace(b"0.5", b"[" * 20 + b"]" * 20)], "is not allowed"),
        ([header("read", ranges=[[0, 0, CHUNK], [0, 0, 1]])], "is not allowed"),
        ([header("read", ranges=[[0, 0]])], "is not allowed"),
        ([header("agree", digests={"w": 1 << 65})], "is not allowed"),
    ],
)
def test_anything_else_is_malformed(frames, what):
    with pytest.raises(MalformedError, match="(?s)" + what.replace("(", r"\(").replace("[", r"\[")):
        unpack(frames, REQUESTS)


def test_a_malformed_request_keeps_its_number():
    with pytest.raises(MalformedError) as error:
        unpack([header("part", offset=-1)], REQUESTS)
    assert error.value.number == 7


def test_a_reply_is_checked_too():
    with pytest.raises(MalformedError, match="status = 'eval' is not allowed"):
        unpack([json.dumps({"kind": "upload", "id": 1, "status": "eval", "have": 0}).encode()], REPLIES)


@pytest.mark.parametrize("fields", [{"facts": {"rho": float("nan")}}, {"facts": {"w": b"bytes"}}])
def test_what_json_cannot_carry_is_not_sent(fields):
    with pytest.raises(ValueError, match="begin: it holds a value that JSON cannot carry"):
        pack(Message("begin", fields))


@pytest.mark.parametrize("sizes", [[0], [5], [0, 3, 0, CHUNK - 1, 2, 0], [3 * CHUNK + 1, 1], [1] * 5000])
def test_blobs_go_through_messages(sizes):
    blobs = {f"w{number}": bytes([number % 251]) * size for number, size in enumerate(sizes)}
    stream = Stream(blobs)
    data = b"".join(stream.read(offset, 1000) for offset in range(0, stream.size, 1000))
    assert data == b"".join(blobs.values()) and stream.size == len(data)
    assert stream.index == {name: len(one) for name, one in blobs.items()}
    memory, offset, places = {}, 0, []
    for name, size in stream.index.items():
        memory[name] = memoryview(bytearray(size))
        places.append(((0, offset, size), memory[name]))
        offset += size
    for batch in batches(places):
        assert batch.size <= CHUNK and batch.size == sum(size for _, _, size in batch.ranges)
        batch.fill(b"".join(data[offset : offset + size] for _, offset, size in batch.ranges))
    assert {name: bytes(one) for name, one in memory.items()} == blobs


@pytest.mark.parametrize(
    ("text", "to_listen", "found"),
    [
        ("10.0.0.1:5555", False, "tcp://10.0.0.1:5555"),
        ("tcp://login-1.cluster:5555", False, "tcp://login-1.cluster:5555"),
        ("[::1]:5555", False, "tcp://[::1]:5555"),
        ("0.0.0.0:0", True, "tcp://0.0.0.0:*"),
    ],
)
def test_addresses(text, to_listen, found):
    assert endpoint(text, "islands.address", to_listen=to_listen) == found


@pytest.mark.parametrize("text", ["", "host", "host:", "host:0", "host:65536", "ipc:///tmp/x", "tcp://a:1;tcp://b:2"])
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match=r"islands.address: .* is not HOST:PORT; use e.g. tcp://10.0.0.1:5555"):
        endpoint(text, "islands.address")


def test_the_secret_comes_from_a_file_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match=f"{VARIABLE} holds no secret"):
        read_secret()
    monkeypatch.setenv(VARIABLE, "short secret")
    with pytest.raises(ValueError, match=f"{VARIABLE}: 12 characters are too few") as error:
        read_secret()
    assert "short secret" not in str(error.value)
    monkeypatch.setenv(VARIABLE, "of the environment")
    (tmp_path / "secret").write_text("in a file, with a newline\n")
    assert read_secret() == "of the environment"
    assert read_secret(tmp_path / "secret") == "in a file, with a newline"

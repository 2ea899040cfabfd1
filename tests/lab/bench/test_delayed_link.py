"""Links with delay and loss: when packets arrive, and what two hosts measure across one."""

import os
import random
import re
import shutil
import subprocess
import sys

import pytest

from relora_ds.lab.bench.delayed_link import OneWay, both_ways
from relora_ds.lab.bench.simulated_link import ADDRESSES, LinkError, LinkSpec, SimulatedLink, parse_link

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")),
    reason="needs root and iproute2, to make network namespaces",
)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1gbit", LinkSpec(1e9)),
        ("100mbit/50ms", LinkSpec(1e8, 0.05)),
        ("20Mbit/0.1s/0.1%", LinkSpec(2e7, 0.1, 0.001)),
        ("20mbit/1%", LinkSpec(2e7, 0.0, 0.01)),
    ],
)
def test_links_in_words(text, spec):
    found = parse_link(text)
    assert (found.rate, found.round_trip_s) == (spec.rate, spec.round_trip_s)
    assert found.loss == pytest.approx(spec.loss) and found.is_delayed is ("/" in text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no link"),
        ("100mbit/50", "is no link"),
        ("100mbit/0.1%/50ms", "is no link"),
        ("100mbit/50ms/100%", "is no link"),
        ("fast/50ms", "is no rate"),
        ("10gbit/50ms", "faster than a link with delay or loss can be simulated; use at most 200mbit"),
    ],
)
def test_what_is_no_link(text, why):
    with pytest.raises(ValueError, match=f"^--links: .*{why}"):
        parse_link(text)


def one_way(**changes) -> OneWay:
    values = {"rate": 8000.0, "delay_s": 5.0, "loss": 0.0, "buffer_s": 2.5, "chance": random.Random(0)}
    return OneWay(**{**values, **changes})  # 1000 bytes a second


def test_packets_wait_for_those_before_them_and_for_the_delay():
    way = one_way()
    for number, now in ((1, 0.0), (2, 0.0), (3, 10.0)):
        way.take(bytes([number]) * 1000, now)
    assert [when for when, _ in way.waiting] == [6.0, 7.0, 16.0]
    assert way.arrived(5.9) == []
    assert [packet[0] for packet in way.arrived(7.0)] == [1, 2] and way.arrived(7.0) == []


def test_a_full_buffer_drops():
    way = one_way()
    for _ in range(5):
        way.take(bytes(1000), 0.0)  # the fourth would wait for 3 s, and the buffer holds 2.5
    assert len(way.waiting) == 3 and way.dropped == 2
    way.take(bytes(1000), 1.0)
    assert len(way.waiting) == 4


def test_the_buffer_holds_a_round_trip_and_a_tenth_of_a_second():
    assert [both_ways(1e6, round_trip_s, 0.0)[0].buffer_s for round_trip_s in (0.0, 0.05, 0.3)] == [0.1, 0.1, 0.3]
    assert [way.delay_s for way in both_ways(1e6, 0.3, 0.0)] == [0.15, 0.15]


def test_losses_are_those_of_the_seed():
    def lost(seed: int) -> list[list[int]]:
        ways = both_ways(1e12, 0.0, 0.1, seed)
        for way in ways:
            for number in range(2000):
                way.take(number.to_bytes(2, "big"), 0.0)
        return [[int.from_bytes(packet, "big") for _, packet in way.waiting] for way in ways]

    first, second = lost(0)
    assert lost(0) == [first, second] and first != second and lost(1)[0] != first
    assert all(1 - len(arrived) / 2000 == pytest.approx(0.1, abs=0.02) for arrived in (first, second))


SERVER = """
import socket, sys
address, what = sys.argv[1:]
with socket.create_server((address, 7000)) as server, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
    datagrams.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)  # SO_RCVBUFFORCE: all of them find room
    datagrams.bind((address, 7000))
    print("ready", flush=True)
    connection, _ = server.accept()
    if what == "echo":
        while received := connection.recv(1):
            connection.sendall(received)
    elif what == "stream":
        while connection.recv(1 << 20):
            pass
    else:
        datagrams.settimeout(1.0)
        count = 0
        try:
            while True:
                datagrams.recv(2000)
                count += 1
        except TimeoutError:
            print(count, flush=True)
"""
CLIENT = """
import socket, sys, time
address, what = sys.argv[1:]
connection = socket.create_connection((address, 7000))
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
if what == "echo":
    for _ in range(10):
        started = time.perf_counter()
        connection.sendall(b"x")
        connection.recv(1)
        print(time.perf_counter() - started)
elif what == "stream":
    started, size = time.perf_counter(), 5_000_000
    connection.sendall(bytes(size))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print(8 * size / (time.perf_counter() - started))
else:
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        for _ in range(2000):
            datagrams.sendto(bytes(100), (address, 7000))
            time.sleep(0.0005)
"""


def across(spec: LinkSpec, what: str) -> tuple[list[str], list[str]]:
    """What the client on host 1 and the server on host 0 print."""

    def on(host: str, code: str) -> subprocess.Popen:
        command = ["ip", "netns", "exec", host, sys.executable, "-c", code, ADDRESSES[0], what]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    try:
        with SimulatedLink(spec) as link:
            server = on(link.hosts[0], SERVER)
            try:
                assert server.stdout.readline() == "ready\n"
                client = on(link.hosts[1], CLIENT)
                return client.communicate(timeout=60)[0].split(), server.communicate(timeout=60)[0].split()
            finally:
                server.kill()
                server.wait()
    except LinkError as error:
        pytest.skip(str(error))


@needs_root
@pytest.mark.parametrize("round_trip_s", [0.02, 0.1])
def test_the_round_trip_that_hosts_measure(round_trip_s):
    found, _ = across(LinkSpec(2e7, round_trip_s), "echo")
    assert round_trip_s <= min(map(float, found)) < 1.05 * round_trip_s + 0.005


@needs_root
def test_a_stream_has_the_rate_of_the_link():
    """The best of some, since the hosts and the link share this machine's cores with all that runs on it."""
    best = 0.0
    for _ in range(5):
        (rate,), _ = across(LinkSpec(2e7, 0.02), "stream")
        assert float(rate) < 2e7
        best = max(best, float(rate))
        if best > 0.85 * 2e7:
            return
    pytest.fail(f"{best / 1e6:.1f} Mbit/s over a link of 20")


@needs_root
def test_datagrams_are_lost():
    _, (count,) = across(LinkSpec(2e7, 0.01, 0.1), "datagrams")
    assert 1 - int(count) / 2000 == pytest.approx(0.1, abs=0.03)


@needs_root
def test_nothing_of_a_link_stays_behind():
    try:
        with SimulatedLink(LinkSpec(1e8, 0.01)) as link:
            hosts, carrier = link.hosts, link._carrier._process
    except LinkError as error:
        pytest.skip(str(error))
    assert carrier.returncode is not None
    there = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    assert not set(hosts) & set(re.findall(r"\S+", there))

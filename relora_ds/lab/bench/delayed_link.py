"""A link with delay and loss, between two network devices whose packets pass through a process of ours.

Not every kernel can delay packets (`tc netem`), but all have TUN devices: what a host sends through one is read from a
file descriptor here, and what is written to it arrives at the host. In each direction a packet

    waits until those before it are sent, and is dropped where that takes longer than the buffer holds
    is sent at the rate of the link
    arrives half a round trip later, or never: a seeded random number decides

The buffer holds one round trip at the link's rate, at least `_BUFFER_S`.
"""

import contextlib
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_LARGEST = 65_536  # bytes of a packet
_BURST = 64  # packets that are read in one direction before the clock is looked at again
_BUFFER_S = 0.1
_NICE = -20  # ranks that compute must not slow the link


def open_device(name: str) -> int:
    """Make a TUN device and return its file descriptor. The device is gone when the last such descriptor is closed.

    Raises:
        OSError: this system has none, or this process may not.
    """
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(device)
        raise
    return device


class Carrier:
    """A process that carries packets between two devices, until `close` or the end of this process.

    Args:
        devices: their descriptors, which belong to the carrier from now on.
        rate: bits per second.
        round_trip_s: seconds from a packet to its answer, at the least.
        loss: part of the packets that never arrive.
    """

    def __init__(self, devices: Sequence[int], rate: float, round_trip_s: float, loss: float):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, (*devices, rate, round_trip_s, loss))],
            pass_fds=devices,
            stdin=subprocess.PIPE,  # which closes when this process ends, however it does
        )
        for device in devices:
            os.close(device)

    def close(self) -> None:
        """End it; the devices disappear."""
        self._process.kill()
        self._process.communicate()


@dataclass
class OneWay:
    """One direction of a link.

    Attributes:
        waiting: (when it arrives, packet), in order.
        dropped, lost: packets that found the buffer full, and that the random number chose.
    """

    rate: float
    delay_s: float
    loss: float
    buffer_s: float
    chance: random.Random
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    dropped: int = 0
    lost: int = 0
    _free_at: float = 0.0

    def take(self, packet: bytes, now: float) -> None:
        """Take a packet that is sent at `now`, in seconds."""
        begins = max(self._free_at, now)
        if begins - now > self.buffer_s:
            self.dropped += 1
            return
        self._free_at = begins + 8 * len(packet) / self.rate
        if self.chance.random() < self.loss:  # it has used the link even so
            self.lost += 1
        else:
            self.waiting.append((self._free_at + self.delay_s, packet))

    def arrived(self, now: float) -> list[bytes]:
        """Return the packets that have arrived by `now`, each once."""
        found = []
        while self.waiting and self.waiting[0][0] <= now:
            found.append(self.waiting.popleft()[1])
        return found


def both_ways(rate: float, round_trip_s: float, loss: float, seed: int = 0) -> tuple[OneWay, OneWay]:
    """Return the two directions of a link, each with random numbers of its own."""

    def one_way(number: int) -> OneWay:
        chance = random.Random(f"{seed}/{number}")
        return OneWay(rate, round_trip_s / 2, loss, max(_BUFFER_S, round_trip_s), chance)

    return one_way(0), one_way(1)


def _carry(devices: tuple[int, int], directions: tuple[OneWay, OneWay]) -> None:
    """Carry packets until the standard input ends."""
    with contextlib.suppress(OSError):  # it may have no right to
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    from_to = list(zip(directions, devices, reversed(devices), strict=True))
    while True:
        due = min((way.waiting[0][0] for way in directions if way.waiting), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        readable, *_ = select.select([*devices, sys.stdin], [], [], timeout)
        if sys.stdin in readable:
            return
        for way, source, target in from_to:
            if source in readable:
                _read(source, way)
            for packet in way.arrived(time.monotonic()):
                with contextlib.suppress(OSError):  # a host that takes nothing more, as on any link
                    os.write(target, packet)


def _read(source: int, way: OneWay) -> None:
    for _ in range(_BURST):
        try:
            way.take(os.read(source, _LARGEST), time.monotonic())
        except BlockingIOError:
            return


if __name__ == "__main__":
    _first, _second, *_link = sys.argv[1:]
    _rate, _round_trip_s, _loss = map(float, _link)
    _carry((int(_first), int(_second)), both_ways(_rate, _round_trip_s, _loss))

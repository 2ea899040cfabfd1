"""Two hosts on one machine: network namespaces that share nothing but a link, whose rate, delay and loss are given."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from relora_ds.lab.bench.delayed_link import Carrier, open_device

ADDRESSES = ("10.213.77.1", "10.213.77.2")
INTERFACE = "link0"  # the name of its end, on both hosts
FASTEST_DELAYED = 200e6  # bits per second that the process behind a delayed link carries in time
_BURST_S = 0.001  # of the token bucket: what may pass at once, a thousandth of a second's bytes
_TCP_IP, _ETHERNET = 20 + 20 + 12, 14  # bytes of headers, with TCP's timestamps
_LINK = re.compile(
    r"(?P<rate>[^/]+)(?:/(?P<time>\d+(?:\.\d+)?)(?P<unit>ms|s))?(?:/(?P<loss>\d+(?:\.\d+)?)%)?", re.IGNORECASE
)


class LinkError(ValueError):
    """There is no link; says what is missing."""


@dataclass(frozen=True)
class LinkSpec:
    """What a link is like.

    Attributes:
        rate: bits per second, in each direction.
        round_trip_s: seconds from a packet to its answer; half of it in each direction.
        loss: part of the packets that never arrive, in each direction.
    """

    rate: float
    round_trip_s: float = 0.0
    loss: float = 0.0

    @property
    def is_delayed(self) -> bool:
        """Whether more than its rate is simulated."""
        return bool(self.round_trip_s or self.loss)

    @property
    def header_bytes(self) -> int:
        """Bytes of the headers of a packet of TCP, as the kernel counts them: a TUN device has none of Ethernet."""
        return _TCP_IP if self.is_delayed else _TCP_IP + _ETHERNET


class SimulatedLink:
    """`with SimulatedLink() as link:` two namespaces joined by a link. Needs root and iproute2.

    A link that has only a rate is a veth pair with a token bucket, one with delay or loss a pair of TUN devices
    (`delayed_link`).

    Args:
        spec: what the link is like; None: as fast as it can be, until `limit` is called.

    Attributes:
        hosts: the namespaces' names; `ip netns exec NAME command` runs a command there.
    """

    def __init__(self, spec: LinkSpec | None = None):
        self.hosts = [f"relora{os.getpid()}-{host}" for host in (0, 1)]
        self._spec = spec
        self._carrier: Carrier | None = None

    def __enter__(self) -> "SimulatedLink":
        if os.geteuid() != 0:
            raise LinkError("network namespaces need root; run this as root (two-hosts: or give --hostfile)")
        for program in ("ip", "tc"):
            if shutil.which(program) is None:
                raise LinkError(f"the program {program} is missing (Debian and Ubuntu: apt install iproute2)")
        try:
            for name in self.hosts:
                _call("ip", "netns", "add", name)
            self._join()
            for name, address in zip(self.hosts, ADDRESSES, strict=True):
                _call("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _call("ip", "-n", name, "link", "set", INTERFACE, "up")
                _call("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self._carrier is not None:
            self._carrier.close()
        for name in self.hosts:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _join(self) -> None:
        """Give both hosts their end of the link."""
        if self._spec is not None and self._spec.is_delayed:
            self._join_by_carrier(self._spec)
            return
        one, other = self.hosts
        ends = ("netns", one, "type", "veth", "peer", "name", INTERFACE, "netns", other)
        _call("ip", "link", "add", INTERFACE, *ends)
        if self._spec is not None:
            self.limit(self._spec.rate)

    def _join_by_carrier(self, spec: LinkSpec) -> None:
        devices: list[int] = []
        try:
            for number, host in enumerate(self.hosts):
                made = f"relora{os.getpid()}{'ab'[number]}"  # in this namespace, whose devices have other names
                devices.append(open_device(made))
                _call("ip", "link", "set", made, "netns", host, "name", INTERFACE)
        except BaseException as error:
            for device in devices:
                os.close(device)
            if isinstance(error, OSError):
                raise LinkError(
                    f"a link with delay or loss needs TUN devices: /dev/net/tun: {error.strerror}"
                ) from error
            raise
        self._carrier = Carrier(devices, spec.rate, spec.round_trip_s, spec.loss)

    def limit(self, bits_per_second: float) -> None:
        """Let so much pass in each direction of a link without delay."""
        for name in self.hosts:
            subprocess.run(
                ["tc", "-n", name, "qdisc", "delete", "dev", INTERFACE, "root"], capture_output=True, check=False
            )
            burst = max(int(bits_per_second / 8 * _BURST_S), 65_536)
            _call(
                "tc",
                "-n",
                name,
                "qdisc",
                "add",
                "dev",
                INTERFACE,
                "root",
                "tbf",
                "rate",
                f"{int(bits_per_second)}bit",
                "burst",
                str(burst),
                "latency",
                "100ms",
            )


def parse_rate(text: str, field: str = "--rate") -> float:
    """`10gbit`, `100mbit`, `1.5gbit` as bits per second. ValueError: it is none."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        number = text.lower().removesuffix(unit)
        if number != text.lower() and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return float(number) * factor
    raise ValueError(f"{field}: {text!r} is no rate; give e.g. 10gbit,1gbit,100mbit")


def parse_link(text: str, field: str = "--links") -> LinkSpec:
    """Read `RATE`, `RATE/ROUND TRIP` or `RATE/ROUND TRIP/LOSS`: `1gbit`, `100mbit/50ms`, `20mbit/100ms/0.1%`.

    Raises:
        ValueError: it is none of them, or too fast for a link with delay or loss.
    """
    found = _LINK.fullmatch(text)
    loss = float(found["loss"] or 0) / 100 if found else 0.0
    if found is None or loss >= 1:
        raise ValueError(
            f"{field}: {text!r} is no link; give rate, round trip and loss, e.g. 1gbit, 100mbit/50ms or "
            "20mbit/100ms/0.1%"
        )
    round_trip_s = float(found["time"] or 0) * (1e-3 if (found["unit"] or "").lower() == "ms" else 1)
    spec = LinkSpec(parse_rate(found["rate"], field), round_trip_s, loss)
    if spec.is_delayed and spec.rate > FASTEST_DELAYED:
        raise ValueError(
            f"{field}: {text!r} is faster than a link with delay or loss can be simulated; use at most "
            f"{FASTEST_DELAYED / 1e6:.0f}mbit, or leave delay and loss out"
        )
    return spec


def _call(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise LinkError(f"two hosts cannot be made here: {' '.join(command)}: {error.stderr.strip()}") from error

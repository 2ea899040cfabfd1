"""Two hosts on one machine: network namespaces that share nothing but a link, whose rate can be limited."""

import os
import shutil
import subprocess

ADDRESSES = ("10.213.77.1", "10.213.77.2")
INTERFACE = "link0"  # the name of its end, on both hosts
_BURST_S = 0.001  # of the token bucket: what may pass at once, a thousandth of a second's bytes


class LinkError(ValueError):
    """There is no link; says what is missing."""


class SimulatedLink:
    """`with SimulatedLink() as link:` two namespaces joined by a veth pair. Needs root and iproute2.

    Attributes:
        hosts: the namespaces' names; `ip netns exec NAME command` runs a command there.
    """

    def __init__(self):
        self.hosts = [f"relora{os.getpid()}-{host}" for host in (0, 1)]

    def __enter__(self) -> "SimulatedLink":
        if os.geteuid() != 0:
            raise LinkError("network namespaces need root; run this as root, or give --hostfile with two machines")
        for program in ("ip", "tc"):
            if shutil.which(program) is None:
                raise LinkError(f"the program {program} is missing (Debian and Ubuntu: apt install iproute2)")
        try:
            for name in self.hosts:
                _call("ip", "netns", "add", name)
            _call(
                "ip",
                "link",
                "add",
                INTERFACE,
                "netns",
                self.hosts[0],
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                self.hosts[1],
            )
            for name, address in zip(self.hosts, ADDRESSES, strict=True):
                _call("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _call("ip", "-n", name, "link", "set", INTERFACE, "up")
                _call("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in self.hosts:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def limit(self, bits_per_second: float) -> None:
        """Let so much pass in each direction."""
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


def parse_rate(text: str) -> float:
    """`10gbit`, `100mbit`, `1.5gbit` as bits per second. ValueError: it is none."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        number = text.lower().removesuffix(unit)
        if number != text.lower() and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return float(number) * factor
    raise ValueError(f"--rate: {text!r} is no rate; give e.g. 10gbit,1gbit,100mbit")


def _call(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise LinkError(f"two hosts cannot be made here: {' '.join(command)}: {error.stderr.strip()}") from error

"""Run the trainer over a link between two hosts: as data parallel, or as two islands.

Each host has one rank. As data parallel the two are one run. As islands each is a run of its own, and their server is
on host 0. Every rank is a process whose variables say which one it is, as those that `launch_scripts/multi_node.sh`
starts. It trains until it has taken the steps that are measured, and leaves: no checkpoint, no export.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from relora_ds.islands.secret import VARIABLE
from relora_ds.lab.bench.simulated_link import ADDRESSES, INTERFACE, SimulatedLink

ADDRESS = f"{ADDRESSES[0]}:5555"  # of the islands' server
_PORT = 29_518
_RANK = "relora_ds.lab.bench.step_recorder"
_TOLD = 2000  # characters of what a failed process has printed

Records = list[list[dict]]  # of each host its steps, see `step_recorder.Recorder`


def data_parallel(link: SimulatedLink, recipe: str, overrides: list[str], steps: int, scratch: Path) -> Records:
    """Train `steps` steps as one run of two ranks, and return what both have recorded.

    Raises:
        ValueError: a rank failed; with what it said.
    """
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": INTERFACE}
    with _Processes(link, scratch) as processes:
        for host in (0, 1):
            own = [*overrides, f"run_dir={scratch / str(host)}"]
            processes.start_rank(host, recipe, own, steps, {**common, "RANK": str(host)})
        return processes.recorded()


def two_islands(link: SimulatedLink, recipe: str, overrides: list[str], steps: int, scratch: Path) -> Records:
    """Train `steps` steps as two islands of a rank each, and return what both have recorded.

    overrides: with the settings of islands, but their index.

    Raises:
        ValueError: a rank or the server failed; with what it said.
    """
    common = {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "RANK": "0"}
    with _Processes(link, scratch, {VARIABLE: secrets.token_hex(32)}) as processes:
        processes.start_server()
        for host in (0, 1):
            own = [*overrides, f"run_dir={scratch / str(host)}", f"islands.index={host}"]
            processes.start_rank(host, recipe, own, steps, common)
        return processes.recorded()


class _Processes:
    """What is started on the hosts, and killed at the end."""

    def __init__(self, link: SimulatedLink, scratch: Path, environment: dict[str, str] | None = None):
        self._link, self._scratch = link, scratch
        cores = str(max(1, len(os.sched_getaffinity(0)) // 2))
        self._environment = {
            "OMP_NUM_THREADS": cores,
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",  # both hosts would have the same GPU
            "DS_ACCELERATOR": "cpu",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_PORT": str(_PORT),
            **(environment or {}),
        }
        self._ranks: list[subprocess.Popen] = []
        self._others: list[subprocess.Popen] = []

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_) -> None:
        for process in (*self._ranks, *self._others):
            process.kill()  # nothing of the runs is kept
            process.wait()

    def start_server(self) -> None:
        """Start the islands' server on host 0, and wait until it listens."""
        command = ["-m", "relora_ds", "islands", "serve", str(self._scratch / "rounds"), "--listen", ADDRESS]
        server = self._start(0, "server", command, {})
        self._others.append(server)
        while "listening on" not in self._said("server"):
            if server.poll() is not None:
                raise ValueError(f"the server of the islands ended: {self._said('server')}")
            time.sleep(0.05)

    def start_rank(self, host: int, recipe: str, overrides: list[str], steps: int, variables: dict[str, str]) -> None:
        """Start the rank of a host."""
        pids = [rank.pid for rank in self._ranks]
        command = ["-m", _RANK, json.dumps([recipe, overrides, steps, pids, str(self._records(host))])]
        self._ranks.append(self._start(host, f"host{host}", command, variables))

    def recorded(self) -> Records:
        """Wait for the ranks, and return what they have recorded."""
        while any(rank.poll() is None for rank in self._ranks) and not any(rank.poll() for rank in self._ranks):
            time.sleep(0.1)
        failed = [host for host, rank in enumerate(self._ranks) if rank.poll()]
        if failed:
            said = "\n".join(f"host {host} said: {self._said(f'host{host}')}" for host in failed)
            raise ValueError(f"a rank failed\n{said}")
        return [json.loads(self._records(host).read_text(encoding="utf-8")) for host in range(len(self._ranks))]

    def _start(self, host: int, name: str, command: list[str], variables: dict[str, str]) -> subprocess.Popen:
        with self._log(name).open("w") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._link.hosts[host], sys.executable, *command],
                env={**self._environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _log(self, name: str) -> Path:
        return self._scratch / f"{name}.log"

    def _records(self, host: int) -> Path:
        return self._scratch / f"host{host}.json"

    def _said(self, name: str) -> str:
        return self._log(name).read_text(encoding="utf-8", errors="replace")[-_TOLD:]

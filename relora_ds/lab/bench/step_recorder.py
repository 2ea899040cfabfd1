"""One rank of `hosts_run`: it trains, and records each of its steps.

The rank of host 1 reads the kernel's counters of both ends of the link before and after each of its steps. An exchange
is within such a step, from the first byte of the island's update to the last one of the other's: island 0 talks to the
server on its own host, so nothing else is on the link. In data parallel the kernel may send the last bytes of a step
within the next one, which does not change a median.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from relora_ds.lab.bench.simulated_link import INTERFACE
from relora_ds.training.hooks import Hook
from relora_ds.training.state import RunState
from relora_ds.training.step import Step


class EnoughSteps(Exception):
    """All steps that are measured are taken."""


class Recorder(Hook):
    """Records every step of a rank.

    Args:
        steps: how many there are.
        hosts: for each end of the link, a process on its host.

    Attributes:
        records: of each step `step_s`, seconds from its forward to its restart or exchange; `sent` and `packets`, by
            host, bytes and packets that the kernel has sent over the link meanwhile; `restart_s` and `exchange`, the
            report, where there was one.
    """

    def __init__(self, steps: int, hosts: list[int]):
        self.records: list[dict] = []
        self._steps = steps
        # They can be read as long as they are open, also after the process has ended.
        self._files = [open(f"/proc/{pid}/net/dev", encoding="ascii") for pid in hosts]  # noqa: SIM115

    @contextlib.contextmanager
    def around_step(self, run: RunState) -> Iterator[None]:
        before, started = self._counters(), time.perf_counter()
        yield
        seconds, after = time.perf_counter() - started, self._counters()
        moved = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]
        self.records.append(
            {"step_s": seconds, "sent": [sent for sent, _ in moved], "packets": [packets for _, packets in moved]}
        )

    def on_restart(self, run: RunState, report) -> None:
        self.records[-1]["restart_s"] = report.restart_s

    def on_exchange(self, run: RunState, report) -> None:
        self.records[-1]["exchange"] = vars(report)

    def on_step(self, run: RunState, step: Step) -> None:
        if not step.applied:
            raise ValueError(f"step {run.step + 1}: its loss or gradient is not finite; use a smaller optim.lr")
        if len(self.records) == self._steps:
            raise EnoughSteps

    def close(self, run: RunState) -> None:
        for file in self._files:
            file.close()

    def _counters(self) -> list[list[int]]:
        return [sent_over(INTERFACE, file) for file in self._files]


def sent_over(interface: str, file: IO[str]) -> list[int]:
    """Return bytes and packets that the host of /proc/PID/net/dev, opened, has sent over an interface."""
    file.seek(0)
    for line in file:
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return [int(number) for number in numbers.split()[8:10]]
    raise ValueError(f"{file.name}: there is no interface {interface}")


def _rank(recipe: str, overrides: list[str], steps: int, others: list[int], out: str) -> None:
    """Train on this rank. others: a process on host 0, where this is host 1."""
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    from relora_ds.training.preflight import check
    from relora_ds.training.trainer import Trainer
    from relora_ds.zero.start import leave

    recorder = Recorder(steps, [*others, os.getpid()] if others else [])
    with contextlib.suppress(EnoughSteps):
        Trainer(check(recipe, overrides), [recorder]).fit()
    Path(out).write_text(json.dumps(recorder.records), encoding="utf-8")
    leave()


if __name__ == "__main__":
    _rank(*json.loads(sys.argv[1]))

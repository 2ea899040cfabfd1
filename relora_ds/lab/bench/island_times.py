"""Medians of what `bench islands` has recorded, what they make of a run's time, and its tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from relora_ds.lab.bench.hosts_run import Records
from relora_ds.utils.text import human_bytes

if TYPE_CHECKING:
    from relora_ds.planning.cost import Cost

PARALLEL, ISLANDS = "data parallel", "islands"
PAUSES = {PARALLEL: "a restart", ISLANDS: "an exchange"}  # what comes between steps
CYCLES = (50, 200, 500, 1000)  # steps between two of them
_FULL = "full"


def summarised(records: Records, every: int, predicted: Cost, header_bytes: int) -> dict:
    """Return the medians of what the ranks of both hosts have recorded.

    Returns:
        Seconds and bytes by the names of the docstring of `slow_links`, those by the kernel as [host 0, host 1]; None
        where there is no such thing.
    """
    plain = [[one for number, one in enumerate(host, 1) if number > every and number % every] for host in records]
    last = [one for number, one in enumerate(records[1], 1) if number > every and number % every == 0]  # of a cycle
    found = {
        "step_s": max(_median(host, "step_s") for host in plain),
        "steps_s": [[one["step_s"] for one in host] for host in plain],
        "restart_s": None,
        "exchange_s": None,
        "waited_s": None,
        "bytes_a_step": None,
        "bytes_a_restart": None,
        "bytes_an_exchange": None,
    }
    if exchanges := [one["exchange"] for one in last if "exchange" in one]:
        counted, *others = {one["bytes_sent"] for one in exchanges}
        assert not others, "exchanges of different sizes"
        found["exchange_s"], found["waited_s"] = _median(exchanges, "exchange_s"), _median(exchanges, "waited_s")
        moved = _sent(last, header_bytes)
        return found | {"bytes_an_exchange": {"formula": predicted.exchange, "counted": counted, **moved}}
    assert predicted.step is not None
    usual = _sent(plain[1], header_bytes)
    found["bytes_a_step"] = {"formula": predicted.step[1], **usual}
    if predicted.restart is not None:
        paused = _sent(last, header_bytes)
        more = {name: [a - b for a, b in zip(paused[name], usual[name], strict=True)] for name in usual}
        found["restart_s"] = _median(last, "restart_s")
        found["bytes_a_restart"] = {"formula": predicted.restart[1], **more}
    return found


def _median(records: Sequence[dict], name: str) -> float:
    return statistics.median(one[name] for one in records)


def _sent(records: Sequence[dict], header_bytes: int) -> dict[str, list[float]]:
    """Return what the kernel has sent in a step by host, with headers and without."""
    kernel, packets = (
        [statistics.median(of_host) for of_host in zip(*(one[name] for one in records), strict=True)]
        for name in ("sent", "packets")
    )
    payload = [size - header_bytes * count for size, count in zip(kernel, packets, strict=True)]
    return {"kernel": kernel, "payload": payload}


def seconds_to(steps: int, step_s: float, pauses: int = 0, pause_s: float = 0.0) -> float:
    """Return the seconds of so many steps, with restarts or exchanges between them."""
    return steps * step_s + pauses * pause_s


def pause_of(row: dict) -> float:
    """Return the seconds of a row's restart or exchange; 0 where it has none."""
    return row["exchange_s"] or row["restart_s"] or 0.0


def mean_step(row: dict, cycle: int) -> float:
    """Return the seconds of a row's step in the mean, with a restart or exchange every `cycle` steps."""
    return seconds_to(cycle, row["step_s"], 1, pause_of(row)) / cycle


def measured_rows(rows: Sequence[dict]) -> list[list[str]]:
    """Return the table of what was measured, with its head."""
    sent = ("bytes", "kernel (payload)")
    table = [["link", "method", "", "step", *sent, "restart or exchange", "waited", *sent]]
    for row in rows:
        table.append(
            [
                row["link"],
                row["method"],
                row["way"],
                seconds_of(row["step_s"]),
                *_shown_bytes(row["bytes_a_step"]),
                seconds_of(pause_of(row)) if pause_of(row) else "",
                "" if row["waited_s"] is None else seconds_of(row["waited_s"]),
                *_shown_bytes(row["bytes_an_exchange"] or row["bytes_a_restart"]),
            ]
        )
    return table


def mean_rows(rows: Sequence[dict]) -> list[list[str]]:
    """Return the table of mean steps, with its head."""
    parallel = {(row["link"], row["method"]): row for row in rows if row["way"] == PARALLEL}
    table = [["link", "method", "", *(f"H = {cycle}" for cycle in CYCLES)]]
    for row in rows:
        cells = []
        for cycle in CYCLES:
            own = mean_step(row, cycle)
            bases = [parallel.get((row["link"], method)) for method in (_FULL, row["method"])]
            times = [f"{mean_step(base, cycle) / own:.3g}x" if base else "–" for base in bases]
            cells.append(f"{seconds_of(own)} ({', '.join(times)})")
        table.append([row["link"], row["method"], row["way"], *cells])
    return table


def seconds_of(seconds: float) -> str:
    """Return seconds with three digits."""
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _shown_bytes(moved: dict | None) -> list[str]:
    """Return the bytes by formula, and by how much the kernel's differ: with headers, and without."""
    if moved is None:
        return ["", ""]
    kernel, payload = (f"{statistics.mean(moved[name]) / moved['formula'] - 1:+.1%}" for name in ("kernel", "payload"))
    return [human_bytes(moved["formula"]), f"{kernel} ({payload})"]

"""Describe where a result was measured, and show results as tables."""

import os
import platform
from pathlib import Path

import torch

from relora_ds.utils.git import commit_of
from relora_ds.utils.versions import installed_versions

_SAME_SEEDS_SINCE = (0, 2, 0)  # random weights are drawn otherwise since this version of relora_ds


def environment_info() -> dict:
    """Return device, threads, versions and commit: what a figure depends on, and no time or day."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **installed_versions(),
        "commit": commit_of(Path(__file__).parents[2]),
    }


def remark_on_seeds(made: dict) -> str | None:
    """Return what is to be said of losses that were measured under the conditions `made`, or None.

    A version that draws the random weights of a seed otherwise gives other losses; what was compared stays comparable.
    """
    version = made.get("relora_ds")
    if version is None or tuple(int(part) for part in version.split(".")[:3]) >= _SAME_SEEDS_SINCE:
        return None
    since = ".".join(map(str, _SAME_SEEDS_SINCE))
    return f"Measured with an earlier version: since relora_ds {since} the same seed gives other initial weights."


def rows_as_markdown(rows: list[list[str]]) -> str:
    """Return a table; the first row is its head, and all columns but the first are aligned to the right."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def _processor() -> str:
    """Return the processor's name where Linux tells it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({found[0] if found else platform.machine()})"

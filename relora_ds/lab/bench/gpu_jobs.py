"""The measurements of `bench gpu-check`, in processes that may die of them.

    python -m relora_ds.lab.bench.gpu_jobs JOBS.json LINES        also as every rank of torchrun

JOBS.json is a list of `[name of a function of JOBS, its arguments]`. What a job finds is a line of LINES when it is
known: `{"result": …}` or `{"error": …}`. After an error the process ends, because a CUDA context may be broken by it,
and the jobs that are left are for another process. Running out of memory breaks nothing: it is in the result.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from relora_ds.lab.bench.baselines import Spec


def machine() -> dict:
    """Return the conditions of the measurements, the GPUs, and the FLOP/s of a large product in bf16."""
    from relora_ds.lab.bench.environment import environment_info
    from relora_ds.lab.bench.throughput import measured_peak_flops

    cuda = torch.cuda.is_available()
    found = {
        "conditions": environment_info(),
        "gpus": torch.cuda.device_count() if cuda else 0,
        "measured_flops": measured_peak_flops("bf16", "cuda" if cuda else "cpu"),
    }
    if cuda:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "capability": list(torch.cuda.get_device_capability()),
        }
    return found


def speed(spec: dict, variant: str, repeats: int) -> dict:
    """Return a row of `bench throughput`."""
    from relora_ds.lab.bench.throughput import TimedVariant, time_in_turns

    (row,) = time_in_turns([TimedVariant(variant, Spec(**spec))], repeats)
    return row


def restart(spec: dict, tokens_per_step: int, restarts: int) -> dict:
    """Pauses, as `bench restart` has them."""
    from relora_ds.lab.bench.restart_time import time_restarts

    return time_restarts(Spec(**spec), tokens_per_step, restarts)


def layer(arguments: list[str]) -> dict:
    """Return what `bench layer` finds."""
    import argparse

    from relora_ds.lab.bench import layer as bench

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(arguments))


JOBS: dict[str, Callable[..., dict]] = {function.__name__: function for function in (machine, speed, restart, layer)}


def main(jobs: list, lines: Path) -> None:
    """Do the jobs in order; on every rank."""
    from relora_ds.training.terminal import quieten_libraries
    from relora_ds.zero.start import init_distributed, leave

    quieten_libraries()
    init_distributed()
    for name, arguments in jobs:
        started = time.monotonic()
        try:
            found: dict = {"result": JOBS[name](**arguments)}
        except Exception as error:  # whatever it is, it belongs into the record
            found = {"error": f"{type(error).__name__}: {error}"}
        if dist.get_rank() == 0 or "error" in found:
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**found, "seconds": time.monotonic() - started}) + "\n")
        if "error" in found:
            raise SystemExit(1)
    leave()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))

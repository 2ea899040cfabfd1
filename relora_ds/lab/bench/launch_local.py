"""Benchmarks of several ranks: under a launcher its ranks, otherwise processes of this machine."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


def launch_local(
    module: str, arguments: argparse.Namespace, num_ranks: int, environment: dict[str, str] | None = None
) -> dict:
    """Return the result of `module.measure(arguments)`, which every rank calls.

    Where a launcher has started this process it is one of the ranks (torchrun, srun, mpirun, deepspeed --module); else
    torchrun starts `num_ranks` here, with the variables of `environment`.

    Raises:
        ValueError: the ranks failed, and have said why; or there are more of them than GPUs.
    """
    from relora_ds.zero.launchers import set_rank

    set_rank()
    if "RANK" in os.environ:
        return _measure(module, arguments)
    from relora_ds.zero.accelerator import rank_problems

    if found := rank_problems(num_ranks):
        raise ValueError(found[0])
    values = {
        name: value for name, value in vars(arguments).items() if isinstance(value, (str, int, float, list, type(None)))
    }
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(num_ranks),
                "-m",
                __name__,
                module,
                json.dumps(values),
                str(out),
            ],
            env={
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)),
                **os.environ,
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=2,
        )
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # torchrun ends its ranks then
        try:
            code = process.wait()
        finally:
            process.terminate()  # where something else has ended the wait
            signal.signal(signal.SIGTERM, before)
        if not out.is_file():
            raise ValueError(f"{module}: the ranks failed (exit code {code}); what they said is above")
        return json.loads(out.read_text(encoding="utf-8"))


def _measure(module: str, arguments: argparse.Namespace) -> dict:
    from importlib import import_module

    from relora_ds.training.terminal import quieten_libraries
    from relora_ds.zero.start import init_distributed

    quieten_libraries()
    init_distributed()
    return import_module(module).measure(arguments)


if __name__ == "__main__":
    found = _measure(sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2])))
    if os.environ["RANK"] == "0":
        Path(sys.argv[3]).write_text(json.dumps(found), encoding="utf-8")

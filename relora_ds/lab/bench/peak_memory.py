"""Peak memory of a training step: full rank, LoRA by PEFT on DeepSpeed, and ReLoRA in every storage format.

Each variant runs in a process of its own, on one rank at ZeRO stage 1: it builds the engine that training would build,
takes one step so that every state exists, and is measured during the second. Tokens are random; no data is needed.

    CUDA    the most that PyTorch's allocator had allocated, and reserved
    CPU     the most that was resident, less what was resident before the network was built. Resident is a page of
            the heap too that was freed and not given back: glibc is told to give back at once. Libraries are loaded
            and warm before, by steps of a tiny network.

The fp32 masters of the frozen weights (and the ledgers of what merges lost) belong to the host. Where the device is the
CPU they are in what is resident; the table takes them out of the peak and shows them apart.
"""

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from relora_ds.config.schema import ACTIVATION_CHECKPOINTING
from relora_ds.lab.bench.baselines import COMPARED, FULL, VARIANTS, Spec, build, require, step
from relora_ds.lab.bench.environment import rows_as_markdown

# glibc: every allocation of 64 kB or more is mapped, and unmapped when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="llama_130m", help="the network's shape (default: %(default)s)")
    parser.add_argument("--r", type=int, default=128, help="rank of the updates (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="tokens of the vocabulary (default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batch-size", type=int, default=2, metavar="N", help="sequences in a step (default: %(default)s)"
    )
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens of each (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="of the run (default: bf16 on cuda, fp32 on cpu, which multiplies bf16 slowly)",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to measure (default here: %(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=COMPARED,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"of {', '.join(map(repr, COMPARED))} (default: those that name neither a compiler nor a checkpointing)",
    )
    parser.add_argument(
        "--checkpointing",
        nargs="+",
        choices=ACTIVATION_CHECKPOINTING,
        default=["none", "full"],
        metavar="MODE",
        help=f"of {', '.join(ACTIVATION_CHECKPOINTING)}, where a variant does not name its own (default: none full)",
    )


def run(arguments: argparse.Namespace) -> dict:
    """Measure one variant after the other.

    Raises:
        ValueError: see `require`; or this machine cannot tell what is resident.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: PyTorch sees no CUDA device here; use --device cpu")
    if arguments.device == "cpu" and not Path("/proc/self/clear_refs").is_file():
        raise ValueError("--device: on the CPU this needs Linux's /proc to tell what is resident")
    shared = {
        name: getattr(arguments, name)
        for name in ("preset", "r", "vocab_size", "micro_batch_size", "seq_len", "precision", "threads")
    }
    shared["precision"] = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    # A variant that names its own checkpointing is the same in every round, and measured once.
    names = {
        Spec(**{"checkpointing": checkpointing, **COMPARED[name], **shared}): name
        for checkpointing in arguments.checkpointing
        for name in arguments.variants
    }
    require(names)
    rows = []
    for spec, name in names.items():
        rows.append({"variant": name, "checkpointing": spec.checkpointing, **_in_a_process(spec, arguments.device)})
        said = rows[-1].get("error") or f"{rows[-1]['peak_bytes'] / 1e9:.2f} GB"
        print(f"{name}, checkpointing {spec.checkpointing}: {said}", file=sys.stderr, flush=True)
    return {**shared, "device": arguments.device, "stage": 1, "rows": rows}


def markdown(result: dict) -> str:
    """Return the table; ratios are to full rank with the same checkpointing, or without where it has no such."""
    full = {row["checkpointing"]: row.get("peak_bytes") for row in result["rows"] if row["variant"] == FULL}
    on_gpu = result["device"] == "cuda"
    rows = [
        [
            "variant",
            "checkpointing",
            "trainable",
            "between steps",
            "peak of a step",
            *["reserved"] * on_gpu,
            "of full rank",
            "on the host",
        ]
    ]
    for row in result["rows"]:
        if "error" in row:
            rows.append([row["variant"], row["checkpointing"], "failed", *[""] * (len(rows[0]) - 3)])
            continue
        base = full.get(row["checkpointing"], full.get("none"))
        rows.append(
            [
                row["variant"],
                row["checkpointing"],
                f"{row['trainable'] / 1e6:.1f}M",
                _gigabytes(row["kept_bytes"]),
                _gigabytes(row["peak_bytes"]),
                *([_gigabytes(row["reserved_bytes"])] if on_gpu else []),
                f"{100 * row['peak_bytes'] / base:.0f} %" if base else "",
                _gigabytes(row["host_bytes"]),
            ]
        )
    threads = "" if result["threads"] is None else f", {result['threads']} CPU threads"
    return (
        f"{result['preset']}, vocabulary {result['vocab_size']:,}, r {result['r']}, {result['micro_batch_size']} x "
        f"{result['seq_len']} tokens, {result['precision']}, one rank, ZeRO-1, {result['device']}{threads}\n\n"
        f"{rows_as_markdown(rows)}"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size else "–"


def _in_a_process(spec: Spec, device: str) -> dict:
    environment = {**os.environ, **MALLOC}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if spec.threads:
        environment["OMP_NUM_THREADS"] = str(spec.threads)
    done = subprocess.run(
        [sys.executable, "-m", "relora_ds.lab.bench.peak_memory", json.dumps(vars(spec))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        # Other variants may need less. A process that the kernel killed for its memory leaves no message.
        reason = (done.stderr.strip().splitlines() or ["no message; it may have run out of memory"])[-1]
        return {"error": f"exit code {done.returncode}; {reason}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(spec: Spec) -> dict:
    """Measure in this process, which measures nothing else."""
    from relora_ds.lowrank.wrap import count_parameters
    from relora_ds.training.terminal import quieten_libraries
    from relora_ds.zero.teardown import release

    quieten_libraries()
    warm = dataclasses.replace(spec, preset="tiny", r=4, vocab_size=512, micro_batch_size=1, seq_len=64)
    engine = build(warm)
    step(engine, warm, 0)
    release(engine)
    del engine
    meter = _Meter(torch.device("cuda") if torch.cuda.is_available() else None)
    engine = build(spec)
    step(engine, spec, 0)
    meter.reset()
    kept = meter.now()
    step(engine, spec, 1)
    peak, reserved = meter.peak()
    host = _host_bytes(engine.frozen)
    resident = 0 if meter.device else host
    return {
        "trainable": count_parameters(engine.module)[0],
        "kept_bytes": kept - resident,
        "peak_bytes": peak - resident,
        "reserved_bytes": reserved,
        "host_bytes": host,
    }


def _host_bytes(frozen) -> int:
    ledgers = frozen.ledgers.values()
    return sum(
        tensor.nbytes
        for tensors in (
            frozen.masters.values(),
            (ledger.intended for ledger in ledgers),
            (ledger.lost for ledger in ledgers),
        )
        for tensor in tensors
    )


class _Meter:
    """Bytes above what there is when it is made, on a CUDA device or (None) resident in the host's memory."""

    def __init__(self, device: torch.device | None):
        self.device = device
        self.base = 0
        self.base = self.now()

    def now(self) -> int:
        gc.collect()
        return (torch.cuda.memory_allocated(self.device) if self.device else resident("VmRSS")) - self.base

    def reset(self) -> None:
        gc.collect()
        if self.device:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            forget_peak()

    def peak(self) -> tuple[int, int | None]:
        """Since `reset`: allocated or resident, and reserved."""
        if self.device:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.base, torch.cuda.max_memory_reserved(self.device)
        return resident("VmHWM") - self.base, None


def forget_peak() -> None:
    """Make VmHWM what VmRSS is: proc_pid_clear_refs(5)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes of this process in the host's memory: now (VmRSS), or at most since `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(json.dumps(measure(Spec(**json.loads(sys.argv[1])))))

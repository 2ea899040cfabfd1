"""How much memory of a host its ranks take while an engine is built, and at the phase transition.

The engine of a full-rank warm start is built and handed over to that of the low-rank phase, as in the trainer; no step
is taken. Each combination runs in processes of its own, whose libraries are loaded and warm before.

    peak    the most that was resident, less what was resident before, summed over the ranks. Ranks need not have theirs
            at the same time: the host's own peak is this or less.
    state   what is resident afterwards: the engine.

Where the device is the CPU, the engine's state is on the host too, and each rank has its own. What the build itself
costs is the peak less the state (at the transition: the larger one of the two engines' states).
"""

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from relora_ds.lab.bench.baselines import without_corpus
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.bench.launch_local import launch_local
from relora_ds.lab.bench.peak_memory import MALLOC, forget_peak, resident
from relora_ds.models.build import count_parameters

FP32 = 4  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="llama_130m", help="the network's shape (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="tokens of the vocabulary (default: %(default)s)"
    )
    parser.add_argument("--r", type=int, default=128, help="rank of the updates (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=int,
        choices=range(4),
        default=[1, 3],
        metavar="STAGE",
        help="of ZeRO (default: 1 3)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        metavar="N",
        help="processes of this machine (default: 1 2 4)",
    )


def run(arguments: argparse.Namespace) -> dict:
    """Measure one combination after the other. ValueError: the ranks failed, or this machine cannot tell."""
    if not Path("/proc/self/clear_refs").is_file():
        raise ValueError("host-memory: it needs Linux's /proc to tell what is resident; run it on Linux")
    shared = {name: getattr(arguments, name) for name in ("preset", "vocab_size", "r", "precision")}
    from relora_ds.planning.network import network_of

    network, _ = network_of(_resolved(argparse.Namespace(**shared, stage=arguments.stages[0]), 1).recipe)
    rows = []
    for stage, num_ranks in itertools.product(arguments.stages, arguments.ranks):
        rows.append(
            launch_local(
                "relora_ds.lab.bench.host_memory", argparse.Namespace(**shared, stage=stage), num_ranks, MALLOC
            )
        )
        print(
            f"stage {stage}, {num_ranks} ranks: build {_gigabytes(rows[-1]['build']['peak_bytes'])}, phase "
            f"transition {_gigabytes(rows[-1]['switch']['peak_bytes'])}",
            file=sys.stderr,
            flush=True,
        )
    return {**shared, "weights": count_parameters(network), "rows": rows}


def measure(arguments: argparse.Namespace) -> dict:
    """Measure on this rank. Collective."""
    from relora_ds.training.phases import build_engine, hand_over
    from relora_ds.zero.teardown import release

    plan, phases = _planned(
        argparse.Namespace(preset="tiny", vocab_size=512, r=4, precision=arguments.precision, stage=arguments.stage)
    )
    engine = build_engine(plan, phases[0])
    engine = build_engine(plan, phases[1], hand_over(engine, plan, phases[1]))
    release(engine)
    plan, phases = _planned(arguments)
    gc.collect()
    base, engines = resident("VmRSS"), []

    def build() -> None:
        engines.append(build_engine(plan, phases[0]))

    def transition() -> None:
        handover = hand_over(engines.pop(), plan, phases[1])
        engines.append(build_engine(plan, phases[1], handover))

    return {
        "stage": arguments.stage,
        "world_size": dist.get_world_size(),
        "build": _watched(build, base),
        "switch": _watched(transition, base),
    }


def _resolved(arguments: argparse.Namespace, world_size: int):
    from relora_ds.training.preflight import resolve

    return resolve(
        "tiny",
        [
            f"model.preset={arguments.preset}",
            f"data.vocab_size={arguments.vocab_size}",
            "data.seq_len=64",
            "train.micro_batch_size=1",
            f"train.batch_sequences={world_size}",
            "warm_start_steps=1",
            f"relora.r={arguments.r}",
            f"precision={arguments.precision}",
            f"deepspeed=zero{arguments.stage}",
        ],
        world_size,
        to_run=False,
    )


def _planned(arguments: argparse.Namespace):
    """`(plan, phases)` of a warm start of one step and a low-rank phase."""
    from relora_ds.planning.network import network_of
    from relora_ds.training.phases import phases_of

    resolved = _resolved(arguments, dist.get_world_size())
    config, _ = network_of(resolved.recipe)
    return without_corpus(resolved, config), phases_of(resolved.recipe)


def _watched(work: Callable[[], None], base: int) -> dict:
    """Bytes above `base`, over all ranks, and the seconds of the slowest one. Collective."""
    gc.collect()
    dist.barrier()
    forget_peak()
    started = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    peak = resident("VmHWM") - base
    gc.collect()
    sizes = torch.tensor([peak, resident("VmRSS") - base])
    dist.all_reduce(sizes)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return {"peak_bytes": int(sizes[0]), "state_bytes": int(sizes[1]), "seconds": float(seconds)}


def copies(row: dict, moment: str, weights: int) -> float:
    """Return what a moment costs besides the state of engines, in fp32 copies of the network."""
    state = max(row["build"]["state_bytes"], row[moment]["state_bytes"])
    return (row[moment]["peak_bytes"] - state) / (FP32 * weights)


def markdown(result: dict) -> str:
    """Return the table."""
    weights = result["weights"]
    rows = [
        [
            "stage",
            "ranks",
            "build: peak",
            "state",
            "fp32 copies besides",
            "time",
            "transition: peak",
            "state",
            "fp32 copies besides",
            "time",
        ]
    ]
    for row in result["rows"]:
        cells = [str(row["stage"]), str(row["world_size"])]
        for moment in ("build", "switch"):
            found = row[moment]
            cells += [
                _gigabytes(found["peak_bytes"]),
                _gigabytes(found["state_bytes"]),
                f"{max(0.0, copies(row, moment, weights)):.2f}",
                f"{found['seconds']:.1f} s",
            ]
        rows.append(cells)
    return (
        f"{result['preset']}, vocabulary {result['vocab_size']:,}: {weights / 1e6:.0f}M weights, "
        f"{_gigabytes(FP32 * weights)} in fp32; r {result['r']}, {result['precision']}, one host, all ranks "
        f"together\n\n{rows_as_markdown(rows)}"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

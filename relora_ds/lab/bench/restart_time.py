"""How long a restart stops training: by size of the network, ZeRO stage, storage format and place of the masters.

A step is taken before every restart, so that there is something to merge, and a second one that takes along what the
next subspace is chosen from; the second is not timed. The pause is all that `engine.restart()`
takes, the drift's two forwards included, as the trainer measures it. Beside it stands one step of a whole batch: the
micro-steps that a rank would take, each as long as the one that was timed, and the reductions that its stage makes.
"""

import argparse
import itertools
import os
import statistics
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from relora_ds.lab.bench.baselines import VARIANTS, Spec, build, require, step, synchronized
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.bench.launch_local import launch_local

FORMATS = [name for name in VARIANTS if name.startswith("ours") and name != "ours, LoRA alone"]
EVERY = (1000, 5000)  # relora.restart_every that the pause is shared out over
SHARED = ("r", "vocab_size", "seq_len", "micro_batch_size", "precision")  # of all Specs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--presets",
        nargs="+",
        default=["llama_20m", "llama_60m", "llama_130m"],
        metavar="PRESET",
        help="shapes (default: llama_20m llama_60m llama_130m)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=FORMATS,
        default=["ours, bf16", "ours, nf4"],
        metavar="NAME",
        help=f"of {', '.join(map(repr, FORMATS))} (default: 'ours, bf16' 'ours, nf4')",
    )
    parser.add_argument(
        "--masters",
        nargs="+",
        choices=["cpu", "device", "none"],
        default=["cpu", "none"],
        help="where the frozen weights' fp32 masters are (default: cpu none)",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=int,
        choices=range(4),
        default=[0, 1, 3],
        metavar="STAGE",
        help="of ZeRO (default: 0 1 3)",
    )
    parser.add_argument("--r", type=int, default=128, help="rank of the updates (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="tokens of the vocabulary (default: %(default)s)"
    )
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens of a row (default: %(default)s)")
    parser.add_argument(
        "--micro-batch-size", type=int, default=4, metavar="N", help="sequences of a forward (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens-per-step",
        type=int,
        default=122_880,
        metavar="N",
        help="of the batch that a pause is compared with, over all ranks (default: %(default)s, the paper's at 60M)",
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16", help="of the run (default: %(default)s)"
    )
    parser.add_argument("--restarts", type=int, default=7, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        metavar="N",
        help="processes of this machine, where no launcher started this one (default: 1 2; on a "
        "machine with one GPU 1)",
    )


def run(arguments: argparse.Namespace) -> dict:
    """Time everything at one number of ranks after the other. ValueError: see `require`, or the ranks failed."""
    from relora_ds.zero.launchers import set_rank

    set_rank()
    launched = "RANK" in os.environ  # with as many ranks as there are then
    require(_specs(arguments))
    ranks = arguments.ranks or ([1] if torch.cuda.device_count() == 1 else [1, 2])
    results = [
        launch_local("relora_ds.lab.bench.restart_time", arguments, n) for n in (ranks[:1] if launched else ranks)
    ]
    return {**results[0], "rows": [row for result in results for row in result["rows"]]}


def measure(arguments: argparse.Namespace) -> dict:
    """Measure on this rank. Collective."""
    rows = []
    for spec in _specs(arguments):
        rows.append(
            {
                "preset": spec.preset,
                "stage": spec.stage,
                "variant": spec.variant,
                "master": spec.master,
                "world_size": dist.get_world_size(),
                **time_restarts(spec, arguments.tokens_per_step, arguments.restarts),
            }
        )
        if dist.get_rank() == 0:
            print(
                f"{dist.get_world_size()} ranks, {spec.preset}, stage {spec.stage}, {spec.variant}, masters "
                f"{spec.master}: {statistics.median(rows[-1]['pauses_s']):.3f} s",
                file=sys.stderr,
                flush=True,
            )
    return {
        **{name: getattr(arguments, name) for name in SHARED},
        "tokens_per_step": arguments.tokens_per_step,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def _specs(arguments: argparse.Namespace) -> list[Spec]:
    shared = {name: getattr(arguments, name) for name in SHARED}
    return [
        Spec(variant, preset, stage=stage, master=master, **shared)
        for preset, stage, variant, master in itertools.product(
            arguments.presets, arguments.stages, arguments.variants, arguments.masters
        )
    ]


def time_restarts(spec: Spec, tokens_per_step: int, restarts: int) -> dict:
    """Return the seconds of each pause, with and without the drift, and of a step; bytes of a restart. Collective."""
    from relora_ds.training.probe import SEQUENCES, drift_probe
    from relora_ds.zero.teardown import release
    from relora_ds.zero.traffic import count_traffic, time_collectives

    micro_steps = tokens_per_step / (spec.micro_batch_size * spec.seq_len * dist.get_world_size())
    engine = build(spec)
    engine.drift_probe = drift_probe(
        engine, np.zeros(SEQUENCES * spec.seq_len), seq_len=spec.seq_len, micro_batch_size=SEQUENCES
    )
    pauses, own, subspaces, steps = [], [], [], []
    engine.after_step = lambda engine: None  # restarts are made here
    _step_before_a_restart(engine, spec, 0)
    with count_traffic() as traffic:
        engine.restart()
    for number in range(1, restarts + 1):
        with time_collectives() as spent:  # with a clock that stands still in collectives
            parts = step(engine, spec, number, lambda: synchronized() - sum(spent().values()))
            communicated = sum(spent().values()) * (1 if spec.stage < 2 else micro_steps)
            steps.append(micro_steps * (parts.forward + parts.backward) + parts.optimizer + communicated)
        _step_before_a_restart(engine, spec, number)
        dist.barrier()
        started = time.perf_counter()
        report = engine.restart()
        pauses.append(_slowest(synchronized() - started))
        own.append(_slowest(report.restart_s))
        subspaces.append(_slowest(report.subspace_s))
    release(engine)
    return {
        "pauses_s": pauses,
        "without_drift_s": own,
        "subspaces_s": subspaces,
        "subspace_bytes": report.subspace_bytes,
        "wire": traffic.wire,
        "step_s": _slowest(statistics.median(steps)),
    }


def _step_before_a_restart(engine, spec: Spec, number: int) -> None:
    """Take a step as one that a scheduled restart follows."""
    scheduled = engine.lr_scheduler.is_scheduled
    engine.lr_scheduler.is_scheduled = lambda t: True
    try:
        step(engine, spec, number)
    finally:
        engine.lr_scheduler.is_scheduled = scheduled


def _slowest(seconds: float) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    if torch.cuda.is_available():
        found = found.cuda()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def markdown(result: dict) -> str:
    """Return the table; the share is of the training time between two restarts."""
    rows = [
        [
            "network",
            "ranks",
            "stage",
            "frozen weights",
            "masters",
            "pause p50",
            "p99",
            "without the drift",
            "subspaces",
            "one step",
            "pause / step",
            *(f"share at {every:,}" for every in EVERY),
            "sent per rank",
        ]
    ]
    for row in result["rows"]:
        pause, worst = np.percentile(row["pauses_s"], [50, 99])
        rows.append(
            [
                row["preset"],
                str(row["world_size"]),
                str(row["stage"]),
                row["variant"].removeprefix("ours, "),
                row["master"],
                _seconds(pause),
                _seconds(worst),
                _seconds(statistics.median(row["without_drift_s"])),
                _subspaces(row),
                _seconds(row["step_s"]),
                f"{pause / row['step_s']:.2f}",
                *(f"{100 * pause / (pause + every * row['step_s']):.4f} %" for every in EVERY),
                f"{row['wire'] / 1e6:.1f} MB",
            ]
        )
    return (
        f"vocabulary {result['vocab_size']:,}, r {result['r']}, {result['precision']}, {result['device']}; one "
        f"step: {result['tokens_per_step']:,} tokens over all ranks, in micro-steps of "
        f"{result['micro_batch_size']} x {result['seq_len']} of which one was timed; "
        f"{len(result['rows'][0]['pauses_s'])} restarts of each, of which p99 is nearly the longest\n\n"
        f"{rows_as_markdown(rows)}"
    )


def _subspaces(row: dict) -> str:
    """Return seconds and bytes of the new A's; nothing of a result from before they were measured."""
    if "subspaces_s" not in row:
        return ""
    return f"{_seconds(statistics.median(row['subspaces_s']))}, {row['subspace_bytes'] / 1e6:.1f} MB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"

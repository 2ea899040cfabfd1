"""Tokens per second of a training step, where its time goes, and how much of what the device can do that is.

Every variant is timed at every micro-batch size. On a CPU, whose clock and neighbours change, all of them are in
memory and take their steps in turns; on CUDA one after the other is measured, alone in memory, several steps at a time:
the device is waited for at their end, as in training where a step is logged. Peak memory is that of these steps. At
stage 3 gathers run beside compute: what is waited for them is a part of forward and backward. One rank with one thread
on a CPU is timed by its process's own clock, which stands still while other programs have its core.

    speed       full rank's seconds / this one's, at the same micro-batch: the median over pairs of steps, on a CPU of
                the same turn
    ceiling     full rank's FLOPs / this one's: the speed of a step that is nothing but matrix products
    hardware    FLOPs that are done, repeated forwards left out / what one large matrix product reaches here
    effective   FLOPs that full rank would need for these tokens / the same
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from relora_ds.lab.bench.baselines import (
    COMPARED,
    FULL,
    Seconds,
    Spec,
    build,
    flops_per_token,
    require,
    seconds_of_steps,
    step,
    synchronized,
)
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.bench.launch_local import launch_local
from relora_ds.lowrank.formats import DTYPES

UNLIKE_FULL_RANK = ("compile", "checkpointing")  # a ceiling says nothing of those that also differ in these
SHARED = ("preset", "r", "vocab_size", "seq_len", "precision", "stage")  # of all Specs
WARM_STEPS = 2
STEPS_AT_A_TIME = {"cuda": 5, "cpu": 1}
MATMUL = {"cuda": 8192, "cpu": 2048}  # size of the square matrices that show what the device can do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        default="llama_60m",
        help="the network's shape; also wide_2, two layers of width 2048, and medium_4, four of 1024 "
        "(default: %(default)s)",
    )
    parser.add_argument("--r", type=int, default=128, help="rank of the updates (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="tokens of the vocabulary (default: %(default)s)"
    )
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens of a row (default: %(default)s)")
    parser.add_argument(
        "--micro-batch-size", type=int, nargs="+", default=[4], metavar="N", help="sizes to try (default: 4)"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16", help="of the run (default: %(default)s)"
    )
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="of ZeRO (default: %(default)s)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=COMPARED,
        default=list(COMPARED),
        metavar="NAME",
        help=f"of {', '.join(map(repr, COMPARED))} (default: all); {FULL!r} is always among them",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="medians are of so many steps (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="processes of this machine, where no launcher started this one (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict:
    """Time one variant after the other. ValueError: see `require`, or the ranks failed."""
    arguments.variants = [FULL, *(name for name in arguments.variants if name != FULL)]
    require(_spec(name, arguments.micro_batch_size[0], arguments) for name in arguments.variants)
    return launch_local("relora_ds.lab.bench.throughput", arguments, arguments.ranks)


def measure(arguments: argparse.Namespace) -> dict:
    """Measure all variants at all sizes. Collective."""
    shared = {name: getattr(arguments, name) for name in SHARED}
    device = _device()
    rows = []
    for size in arguments.micro_batch_size:
        variants = [TimedVariant(name, _spec(name, size, arguments)) for name in arguments.variants]
        for group in [variants] if device == "cpu" else [[one] for one in variants]:
            rows += time_in_turns(group, arguments.repeats)
    return {
        **shared,
        "device": device,
        "world_size": dist.get_world_size(),
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
        "peak_flops": measured_peak_flops(shared["precision"], device),
        "rows": rows,
    }


def _spec(name: str, micro_batch_size: int, arguments: argparse.Namespace) -> Spec:
    shared = {key: getattr(arguments, key) for key in SHARED}
    return Spec(micro_batch_size=micro_batch_size, **shared, **COMPARED[name])


class TimedVariant:
    """An engine that takes steps. Built when it warms up."""

    def __init__(self, name: str, spec: Spec):
        self.name, self.spec = name, spec
        self._engine, self._number = None, 0

    def warm_up(self) -> None:
        """Build it, and take the steps in which memory is allocated and kernels are chosen."""
        self._engine = build(self.spec)
        for _ in range(WARM_STEPS):
            self.step()

    def step(self, clock: Callable[[], float] = time.perf_counter) -> Seconds:
        self._number += 1
        return step(self._engine, self.spec, self._number, clock)

    def seconds_of_a_step(self) -> float:
        """Return the seconds of one of some steps in a row."""
        count = STEPS_AT_A_TIME[_device()]
        self._number += count
        return seconds_of_steps(self._engine, self.spec, self._number, count, _clock())

    def close(self) -> None:
        if self._engine is not None:
            from relora_ds.zero.teardown import release

            release(self._engine)
            self._engine = None


def time_in_turns(group: list[TimedVariant], repeats: int) -> list[dict]:
    """Return the rows of variants that take turns."""
    try:
        for one in group:
            one.warm_up()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        turns = [[one.seconds_of_a_step() for one in group] for _ in range(repeats)]
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return [_row(one, list(steps), peak) for one, steps in zip(group, zip(*turns, strict=True), strict=True)]
    except torch.OutOfMemoryError:  # is a result too
        if dist.get_world_size() > 1:  # the others are in a collective that this rank will not join
            raise
        return [
            {"variant": one.name, "micro_batch_size": one.spec.micro_batch_size, "error": "out of memory"}
            for one in group
        ]
    finally:
        for one in group:
            one.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _row(one: TimedVariant, steps: list[float], peak: int | None) -> dict:
    parts = [_parts(one) for _ in range(3)]
    seconds, spec = statistics.median(steps), one.spec
    tokens_per_s = spec.micro_batch_size * spec.seq_len * dist.get_world_size() / seconds
    if dist.get_rank() == 0:
        print(
            f"micro-batch {spec.micro_batch_size}, {one.name}: {tokens_per_s:,.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )
    return {
        "variant": one.name,
        "micro_batch_size": spec.micro_batch_size,
        "flops_per_token": flops_per_token(spec),
        "steps_s": steps,
        "step_s": seconds,
        "tokens_per_s": tokens_per_s,
        "peak_bytes": peak,
        "parts_s": {part: statistics.median(found[part] for found in parts) for part in parts[0]}
        | {"data": _data_seconds(spec)},
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_alone() -> bool:
    """Return whether a step is the work of one CPU thread."""
    return _device() == "cpu" and dist.get_world_size() == 1 and torch.get_num_threads() == 1


def _clock() -> Callable[[], float]:
    return time.process_time if _is_alone() else synchronized


def _parts(variant: TimedVariant) -> dict[str, float]:
    """Return the seconds of the parts of a step that waits for every part and every collective of DeepSpeed."""
    from relora_ds.zero.traffic import time_collectives

    with time_collectives() as spent:  # with a clock that stands still in collectives
        clock = _clock()
        found = variant.step(clock if _is_alone() else lambda: clock() - sum(spent().values()))
        reduce = sum(seconds for name, seconds in spent().items() if "reduce" in name)
        return {**vars(found), "reduce": reduce, "gather": sum(spent().values()) - reduce}


def _data_seconds(spec: Spec) -> float:
    """Until the next step's rows are tensors, cut and shuffled as the trainer's are; the corpus is in memory."""
    from relora_ds.data import TrainLoader

    world_size = dist.get_world_size()
    tokens = np.zeros(64 * world_size * spec.micro_batch_size * spec.accumulation * spec.seq_len + 1, dtype=np.uint16)
    loader = TrainLoader(
        tokens,
        spec.seq_len,
        spec.micro_batch_size * spec.accumulation * world_size,
        spec.micro_batch_size,
        dist.get_rank(),
        world_size,
        seed=0,
    )
    times = []
    for _ in range(9):
        started = time.perf_counter()
        list(loader.next_step())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measured_peak_flops(precision: str, device: str) -> float:
    """Per second, of a large matrix product: in the run's precision, or in fp32 where a CPU is faster in that."""
    found, size = [], MATMUL[device]
    for dtype in {DTYPES[precision], *((torch.float32,) if device == "cpu" else ())}:
        a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
        times = []
        for _ in range(8):
            started = time.perf_counter()
            torch.mm(a, b)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        found.append(2 * size**3 / min(times))  # the fastest: it is a bound
    return max(found)


def speed_of(row: dict, rows: list[dict]) -> float | None:
    """Full rank's seconds over this row's, at its micro-batch; None where full rank did not fit."""
    base = next(
        (
            one
            for one in rows
            if one["variant"] == FULL and "error" not in one and one["micro_batch_size"] == row["micro_batch_size"]
        ),
        None,
    )
    if base is None:
        return None
    return statistics.median(full / this for full, this in zip(base["steps_s"], row["steps_s"], strict=True))


def markdown(result: dict) -> str:
    """Two tables: every micro-batch, and each variant at its best."""
    rows, peak = result["rows"], result["peak_flops"] * result["world_size"]
    sizes = list(dict.fromkeys(row["micro_batch_size"] for row in rows))
    on_gpu = result["device"] == "cuda"
    table = [
        [
            "variant",
            "micro-batch",
            "tokens/s",
            "speed",
            "ceiling",
            "of ceiling",
            "forward",
            "backward",
            "reduce",
            "gather",
            "optimizer",
            "data",
            "hardware",
            "effective",
            *["peak memory"] * on_gpu,
        ]
    ]
    full = next((row["flops_per_token"] for row in rows if row["variant"] == FULL and "error" not in row), None)
    for row in rows:
        if "error" in row:
            table.append([row["variant"], str(row["micro_batch_size"]), row["error"], *[""] * (len(table[0]) - 3)])
            continue
        speed, flops = speed_of(row, rows), row["flops_per_token"]
        alike = full and not any(key in COMPARED[row["variant"]] for key in UNLIKE_FULL_RANK)
        ceiling = full / flops if alike else None
        table.append(
            [
                row["variant"],
                str(row["micro_batch_size"]),
                f"{row['tokens_per_s']:,.0f}",
                _ratio(speed),
                _ratio(ceiling),
                f"{100 * speed / ceiling:.0f} %" if speed and ceiling else "",
                *(
                    f"{1000 * row['parts_s'][part]:.0f} ms"
                    for part in ("forward", "backward", "reduce", "gather", "optimizer")
                ),
                f"{1000 * row['parts_s']['data']:.1f} ms",
                f"{100 * flops * row['tokens_per_s'] / peak:.0f} %",
                f"{100 * full * row['tokens_per_s'] / peak:.0f} %" if full else "",
                *([f"{row['peak_bytes'] / 1e9:.2f} GB"] if on_gpu else []),
            ]
        )
    head = (
        f"{result['preset'].rpartition('/')[2]}, vocabulary {result['vocab_size']:,}, r {result['r']}, rows of "
        f"{result['seq_len']} tokens, {result['precision']}, {_count(result['world_size'], 'rank')}, "
        f"ZeRO-{result['stage']}, {result['device']}"
        + ("" if on_gpu else f", {_count(result['threads'], 'thread')} each")
        + f", medians of {result['repeats']}. A large matrix product: {result['peak_flops'] / 1e9:,.0f} GFLOP/s."
    )
    blocks = [head, rows_as_markdown(table)]
    if len(sizes) > 1:
        blocks += ["Each at its best micro-batch:", rows_as_markdown(_best(rows))]
    return "\n\n".join(blocks)


def _best(rows: list[dict]) -> list[list[str]]:
    best: dict[str, dict] = {}
    for row in rows:
        if "error" not in row and row["tokens_per_s"] > best.get(row["variant"], {"tokens_per_s": 0})["tokens_per_s"]:
            best[row["variant"]] = row
    base = best[FULL]["tokens_per_s"] if FULL in best else None
    return [
        ["variant", "micro-batch", "tokens/s", "of full rank's best"],
        *(
            [
                name,
                str(row["micro_batch_size"]),
                f"{row['tokens_per_s']:,.0f}",
                f"{row['tokens_per_s'] / base:.2f}x" if base else "",
            ]
            for name, row in best.items()
        ),
    ]


def _ratio(value: float | None) -> str:
    return f"{value:.2f}x" if value else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"

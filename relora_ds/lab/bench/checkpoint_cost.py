"""Bytes and seconds of a checkpoint: ours at and between restarts, DeepSpeed's of the same engine, and at full rank.

One rank at ZeRO stage 1, in this process. DeepSpeed's returns when the operating system has the bytes; ours counts as
written when they are on the disk, but training waits for neither: only for the copy.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from relora_ds.lab.bench.baselines import FULL, Spec, build, step
from relora_ds.lab.bench.environment import rows_as_markdown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="llama_130m", help="the network's shape (default: %(default)s)")
    parser.add_argument("--r", type=int, default=128, help="rank of the updates (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="tokens of the vocabulary (default: %(default)s)"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16", help="of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="medians are of so many (default: %(default)s)"
    )
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary one)")


def run(arguments: argparse.Namespace) -> dict:
    """Measure one after the other."""
    shared = {
        "preset": arguments.preset,
        "r": arguments.r,
        "vocab_size": arguments.vocab_size,
        "precision": arguments.precision,
    }
    rows = []
    for variant in ("ours, dense", FULL):
        spec = Spec(variant, micro_batch_size=1, seq_len=32, **shared)
        engine = build(spec)
        step(engine, spec, 0)
        if variant != FULL:
            rows += _ours(engine, arguments)
        rows.append(
            _deepspeeds(engine, arguments, "DeepSpeed's, same state" if variant != FULL else "DeepSpeed's, full rank")
        )
        del engine
    return {**shared, "repeats": arguments.repeats, "rows": rows}


def markdown(result: dict) -> str:
    """Return the table; ratios are to DeepSpeed's checkpoint of the same state."""
    base = next(row["bytes"] for row in result["rows"] if row["variant"].endswith("same state"))
    rows = [["", "bytes written", "of DeepSpeed's", "training waits", "written after"]]
    rows += [
        [
            row["variant"],
            f"{row['bytes'] / 1e6:.0f} MB",
            f"{100 * row['bytes'] / base:.0f} %",
            f"{row['stall_s']:.2f} s",
            f"{row['write_s']:.2f} s",
        ]
        for row in result["rows"]
    ]
    return (
        f"{result['preset']}, vocabulary {result['vocab_size']:,}, r {result['r']}, {result['precision']}, "
        f"one rank, ZeRO-1, medians of {result['repeats']}\n\n{rows_as_markdown(rows)}"
    )


def _ours(engine, arguments: argparse.Namespace) -> list[dict]:
    from relora_ds.zero.checkpoints import writer_of

    found: dict[str, list[tuple]] = {"ours, the first of a cycle": [], "ours, between restarts": []}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            writer = writer_of(engine, Path(directory))
            for number, rows in enumerate(found.values(), 1):
                writer.save(number, {})
                writer.wait()
                (done,) = writer.take_finished()
                if done.error:
                    raise OSError(done.error)
                rows.append((done.new_bytes, done.stall_s, done.write_s))
            writer.close()
    return [_row(variant, rows) for variant, rows in found.items()]


def _deepspeeds(engine, arguments: argparse.Namespace, variant: str) -> dict:
    rows = []
    for _ in range(arguments.repeats):
        directory = Path(tempfile.mkdtemp(dir=arguments.directory))
        started = time.perf_counter()
        super(type(engine), engine).save_checkpoint(str(directory), tag="one")  # without the masters that ours adds
        seconds = time.perf_counter() - started
        rows.append((sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()), seconds, seconds))
        shutil.rmtree(directory)
    return _row(variant, rows)


def _row(variant: str, rows: list[tuple[int, float, float]]) -> dict:
    sizes, stalls, writes = zip(*rows, strict=True)
    return {
        "variant": variant,
        "bytes": sizes[-1],
        "stall_s": statistics.median(stalls),
        "write_s": statistics.median(writes),
    }

"""Where the time goes between the command and the first optimizer step.

The ranks are started by the `deepspeed` launcher, as a user's are, and run the trainer up to its first step: once with
an empty data cache and once with a full one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = (
    "launcher",
    "import torch",
    "import transformers",
    "import deepspeed",
    "import relora_ds",
    "recipe, data, tokenizer",
    "process group",
    "run directory",
    "engine",
    "first step",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="tiny", metavar="RECIPE", help="a YAML file, or a shipped recipe (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="number of ranks (default: %(default)s)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="starts with a full data cache, of which the medians are shown (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe")


def run(arguments: argparse.Namespace) -> dict:
    """Start once with an empty data cache, then `repeats` times with a full one. ValueError: a start failed."""
    with tempfile.TemporaryDirectory() as scratch:
        starts = [_start(arguments, Path(scratch)) for _ in range(1 + arguments.repeats)]
    return {
        "config": arguments.config,
        "overrides": arguments.overrides,
        "ranks": arguments.ranks,
        "empty_cache_s": starts[0],
        "full_cache_s": starts[1:],
    }


def _start(arguments: argparse.Namespace, scratch: Path) -> dict[str, float]:
    out = scratch / "marks.json"
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            str(arguments.ranks),
            "--module",
            __name__,
            repr(time.time()),
            str(out),
            arguments.config,
            *arguments.overrides,
            f"run_dir={scratch / 'run'}",
            "overwrite=true",
        ],
        env={"OMP_NUM_THREADS": "1", **os.environ, "RELORA_DS_CACHE": str(scratch / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if not out.is_file():
        raise ValueError(f"startup: the ranks failed (exit code {done.returncode}): {done.stderr[-500:]}")
    found = json.loads(out.read_text(encoding="utf-8"))
    print(f"{sum(found.values()):.1f} s to the first step", file=sys.stderr, flush=True)
    return found


def markdown(result: dict) -> str:
    """Return the table."""
    from relora_ds.lab.bench.environment import rows_as_markdown  # it imports torch, which is timed

    stages = list(result["empty_cache_s"])
    full = {stage: statistics.median(start[stage] for start in result["full_cache_s"]) for stage in stages}
    rows = [["", "data cache full", "empty"]]
    rows += [[stage, f"{full[stage]:.2f} s", f"{result['empty_cache_s'][stage]:.2f} s"] for stage in stages]
    totals = [sum(start.values()) for start in result["full_cache_s"]]
    rows.append(["in all", f"{statistics.median(totals):.2f} s", f"{sum(result['empty_cache_s'].values()):.2f} s"])
    named = " ".join([result["config"], *result["overrides"]])
    return (
        f"`deepspeed --num_gpus {result['ranks']} train.py --config {named}`, medians of {len(totals)} starts with "
        f"a full cache, one with an empty one\n\n{rows_as_markdown(rows)}"
    )


class _FirstStepTaken(Exception):
    pass


def _rank(launched: float, out: Path, config: str, overrides: list[str]) -> None:
    """Start as train.py does, look at the clock after each stage, and leave after the first step."""
    marks = [launched, time.time()]

    def mark() -> None:
        marks.append(time.time())

    import torch  # noqa: F401

    mark()
    import transformers  # noqa: F401

    mark()
    import relora_ds.zero.start  # noqa: F401 (it imports DeepSpeed)

    mark()
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    from relora_ds.training.hooks import Hook
    from relora_ds.training.preflight import check
    from relora_ds.training.state import RunState
    from relora_ds.training.step import Step
    from relora_ds.training.trainer import Trainer
    from relora_ds.zero.launchers import set_rank
    from relora_ds.zero.start import leave

    mark()

    class Marks(Hook):
        def on_start(self, run: RunState) -> None:
            mark()

        def on_begin(self, run: RunState) -> None:
            mark()

        def on_phase(self, run: RunState) -> None:
            mark()

        def on_step(self, run: RunState, step: Step) -> None:
            mark()
            raise _FirstStepTaken

    set_rank()
    plan = check(config, overrides)
    mark()
    try:
        Trainer(plan, [Marks()]).fit()
    except _FirstStepTaken:
        if os.environ["RANK"] == "0":
            spans = dict(
                zip(STAGES, (after - before for before, after in zip(marks, marks[1:], strict=False)), strict=True)
            )
            out.write_text(json.dumps(spans), encoding="utf-8")
    leave()


if __name__ == "__main__":
    _, _launched, _out, _config, *_overrides = [a for a in sys.argv if not a.startswith("--local_rank")]
    _rank(float(_launched), Path(_out), _config, _overrides)

"""What the trainer costs beside the engine: metrics, guard, progress, the question whether to stop.

In one run, blocks of the trainer's own steps take turns with blocks of bare ones: forward, backward and step on the
same engine with the same loader's batches, and nothing else. A block is `log.every` steps, so that each of the
trainer's holds one logged step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import TYPE_CHECKING

from relora_ds.lab.bench.baselines import synchronized
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.bench.launch_local import launch_local
from relora_ds.training.hooks import Hook

if TYPE_CHECKING:
    from relora_ds.training.state import RunState
    from relora_ds.training.step import Step

WARM_BLOCKS = 1
_QUIET = ("warm_start_steps=0", "eval.every=1000000", "eval.samples=0", "checkpoint.every=1000000", "overwrite=true")


class TakingTurns(Hook):
    """Takes a block of bare steps after every block of the trainer's own.

    All of the loop around a step is the trainer's; a block of bare steps is a part of one step for it.

    Attributes:
        seconds: of every block, (the trainer's, bare).
    """

    def __init__(self) -> None:
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self._began = 0.0

    def on_phase(self, run: RunState) -> None:
        self._began = synchronized()

    def on_step(self, run: RunState, step: Step) -> None:
        length = run.recipe.log.every
        if run.step % (2 * length) != length:
            return
        self.seconds[0].append(synchronized() - self._began)
        began, before = synchronized(), run.engine.t
        for _ in range(length):
            for micro_batch in run.loader.next_step():
                loss = run.engine(**micro_batch).loss
                run.engine.backward(loss)
                run.engine.step()
        self.seconds[1].append(synchronized() - began)
        assert run.engine.t == before + length, "the bare steps were not all taken"
        run.totals.step = run.phase.start + run.engine.t
        self._began = synchronized()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default="quickstart",
        metavar="RECIPE",
        help="a YAML file, or a shipped recipe (default: %(default)s)",
    )
    parser.add_argument("--blocks", type=int, default=9, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="processes of this machine, where no launcher started this one (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe")


def run(arguments: argparse.Namespace) -> dict:
    """Train, and compare the blocks. ValueError: the ranks failed."""
    return launch_local("relora_ds.lab.bench.trainer_overhead", arguments, arguments.ranks)


def measure(arguments: argparse.Namespace) -> dict:
    """Measure on this rank. Collective."""
    import torch
    import torch.distributed as dist

    from relora_ds.config import load_recipe
    from relora_ds.training.preflight import check
    from relora_ds.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as directory:
        every = load_recipe(arguments.config, arguments.overrides).log.every
        steps = every * 2 * (WARM_BLOCKS + arguments.blocks) + 1
        plan = check(
            arguments.config,
            [
                *arguments.overrides,
                *_QUIET,
                f"train.steps={steps}",
                f"relora.restart_every={10 * steps}",
                f"run_dir={directory}",
            ],
        )
        turns = TakingTurns()
        Trainer(plan, [turns]).fit()
    own, bare = (blocks[WARM_BLOCKS:] for blocks in turns.seconds)
    return {
        "config": arguments.config,
        "overrides": arguments.overrides,
        "world_size": dist.get_world_size(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "log_every": every,
        "trainer_s": own,
        "bare_s": bare,
    }


def markdown(result: dict) -> str:
    """Return the table."""
    own, bare = (statistics.median(result[name]) / result["log_every"] for name in ("trainer_s", "bare_s"))
    pairs = [100 * (one / other - 1) for one, other in zip(result["trainer_s"], result["bare_s"], strict=True)]
    named = " ".join([result["config"], *result["overrides"]])
    rows = [
        ["recipe", "ranks", "the trainer's step", "bare", "overhead, medians", "median over pairs of blocks"],
        [
            named,
            str(result["world_size"]),
            f"{1000 * own:.1f} ms",
            f"{1000 * bare:.1f} ms",
            f"{100 * (own / bare - 1):+.2f} %",
            f"{statistics.median(pairs):+.2f} %",
        ],
    ]
    return (
        f"{result['device']}, {len(result['trainer_s'])} blocks of {result['log_every']} steps of each kind, in "
        f"turns\n\n{rows_as_markdown(rows)}"
    )

"""What the trainer costs beside the engine: metrics, guard, progress, the question whether to stop.

In one run, blocks of the trainer's own steps take turns with blocks of bare ones: forward, backward and step on the
same engine with the same loader's batches, and nothing else. A block is `log.every` steps, so that each of the
trainer's holds one logged step.
"""

import argparse
import statistics
import tempfile

from relora_ds.lab.bench.baselines import synchronized
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.bench.launch_local import launch_local

WARM_BLOCKS = 1
_QUIET = ("warm_start_steps=0", "eval.every=1000000", "eval.samples=0", "checkpoint.every=1000000", "overwrite=true")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="quickstart", metavar="RECIPE", help="(default: %(default)s)")
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
    return launch_local("relora_ds.lab.bench.trainer", arguments, arguments.ranks)


def measure(arguments: argparse.Namespace) -> dict:
    """On every rank."""
    import torch
    import torch.distributed as dist

    from relora_ds.config import load_recipe
    from relora_ds.training.preflight import check
    from relora_ds.training.trainer import Trainer

    class TakingTurns(Trainer):
        """Attributes: seconds: of every block, [the trainer's, bare]."""

        seconds: tuple[list[float], list[float]] = ([], [])
        _began = 0.0

        def _train_step(self):
            # All of the loop around a step is the trainer's; a block of bare steps is a single one for it.
            length = self.recipe.log.every
            if self.account.step % (2 * length) == 0:
                self._began = synchronized()
            super()._train_step()
            if self.account.step % (2 * length) != length:
                return
            self.seconds[0].append(synchronized() - self._began)
            began, before = synchronized(), self.engine.t
            for _ in range(length):
                for micro_batch in self.loader.next_step():
                    loss = self.engine(**micro_batch).loss
                    self.engine.backward(loss)
                    self.engine.step()
            self.seconds[1].append(synchronized() - began)
            assert self.engine.t == before + length, "the bare steps were not all taken"
            self.account.step = self.phase.start + self.engine.t

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
        trainer = TakingTurns(plan)
        trainer.fit()
    own, bare = (blocks[WARM_BLOCKS:] for blocks in trainer.seconds)
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

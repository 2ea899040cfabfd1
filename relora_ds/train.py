"""`train.py`, also as `python -m relora_ds train` and `deepspeed --module relora_ds.train`."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from relora_ds.config import RecipeError, load_recipe
from relora_ds.config.command_line import add_recipe, recipe_of
from relora_ds.training import exit_codes
from relora_ds.training.exit_codes import GuardError, Preempted
from relora_ds.zero.launchers import set_rank

if TYPE_CHECKING:
    from relora_ds.training.hooks import Hook
    from relora_ds.training.trainer import Trainer


def parser_of(program: str) -> argparse.ArgumentParser:
    """Return the parser of a command line: a recipe and its overrides."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Pre-train a language model with ReLoRA on DeepSpeed ZeRO.",
        epilog="Examples:  deepspeed --num_gpus 2 train.py quickstart relora.r=32 train.steps=1000   |   "
        "torchrun --nproc_per_node 2 train.py --config my.yaml   |   relora train tiny",
    )
    add_recipe(parser, default="quickstart")
    # The DeepSpeed launcher appends it; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None, program: str = "train.py") -> int:
    """Run the recipe of a command line on this rank; returns the exit code."""
    parser = parser_of(program)
    arguments, rest = parser.parse_known_intermixed_args(argv)
    unknown = [a for a in rest if a.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}; recipe keys are given as section.key=value")
    try:
        recipe, overrides = recipe_of(arguments)
    except RecipeError as error:
        parser.error("; ".join(error.problems))
    return run(recipe, overrides)


def run(config: str, overrides: Sequence[str] = (), hooks: Iterable[Hook] = ()) -> int:
    """Train a recipe on this rank, as the command line does.

    A script that calls it is started by the same launchers as train.py. (`Trainer(plan, hooks).fit()` raises instead,
    and returns the summary.)

    Args:
        config: a YAML file, or the name of a shipped recipe.
        overrides: `section.key=value`.
        hooks: called beside the trainer's own, see `relora_ds.Hook`.

    Returns:
        The exit code, see `training.exit_codes`; what went wrong is printed and stands in status.json.
    """
    try:
        set_rank()  # before anything reads RANK or WORLD_SIZE
    except ValueError as error:
        return _stop(None, os.environ.get("RANK", "0") == "0", str(error), exit_codes.ERROR)
    # Once on every machine: what is wrong may be wrong on one of them only.
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    from relora_ds.training.requeue import remember_refusal

    try:
        load_recipe(config, overrides)  # a typing error is refused before torch is imported
    except RecipeError as error:
        remember_refusal()
        return _stop(None, is_first, str(error), exit_codes.RECIPE)
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    from relora_ds.zero import accelerator

    if found := accelerator.problems():  # before DeepSpeed is imported for a device that it has no packages for
        return _stop(None, is_first, "; ".join(found), exit_codes.ERROR)
    from relora_ds.checkpoint.find import ResumeError
    from relora_ds.training.preflight import check
    from relora_ds.training.trainer import Trainer
    from relora_ds.zero.start import leave

    trainer = None
    try:
        trainer = Trainer(check(config, overrides), hooks)
        trainer.fit()
        leave()
        return exit_codes.DONE
    except Preempted as error:
        code = _stop(trainer, is_first, str(error), exit_codes.PREEMPTED, "preempted")
        leave()
        return code
    except RecipeError as error:
        remember_refusal()
        return _stop(trainer, is_first, str(error), exit_codes.RECIPE)
    except GuardError as error:
        return _stop(trainer, is_first, str(error), exit_codes.GUARD)
    except ResumeError as error:
        if trainer is not None and not trainer.has_begun:
            remember_refusal()
        code = _stop(trainer, is_first, str(error), exit_codes.RESUME)
        leave()  # every rank does
        return code
    except KeyboardInterrupt:
        return _stop(
            trainer,
            is_first,
            "interrupted, and nothing saved for it; resume=auto resumes from the newest checkpoint (SIGTERM would have "
            "saved first)",
            exit_codes.ERROR,
        )
    except SystemExit as error:  # whatever its code is, the run is not done
        reason = f"rank {os.environ.get('RANK', 0)}: sys.exit({error.code!r}) in a hook; SIGTERM would have saved first"
        return _stop(trainer, True, reason, exit_codes.ERROR)
    except Exception as error:
        traceback.print_exc()
        return _stop(trainer, True, f"rank {os.environ.get('RANK', 0)}: {error}", exit_codes.ERROR)


def _stop(trainer: Trainer | None, say: bool, reason: str, exit_code: int, state: str = "failed") -> int:
    """Say why the run ends, and write it into status.json; returns the exit code."""
    if say:
        host = "" if os.environ.get("RANK", "0") == "0" else f"{socket.gethostname()}: "
        print(f"{host}{'error' if state == 'failed' else state}: {reason}", file=sys.stderr, flush=True)
    if trainer is not None:
        trainer.set_status(state, reason, exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

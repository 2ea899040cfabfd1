"""`relora COMMAND`, also `python -m relora_ds COMMAND`; see `relora_ds.commands`."""

import argparse
import importlib
import sys
from pathlib import Path

from relora_ds import __version__, commands
from relora_ds.config import RecipeError
from relora_ds.lab import commands as lab_commands

# name -> (what it does, its module)
COMMANDS = {
    name: (what, f"{room.__name__}.{name}") for room in (commands, lab_commands) for name, what in room.COMMANDS.items()
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--local_rank="):  # the DeepSpeed launcher's; LOCAL_RANK says the same
        argv = argv[1:]
    name = argv[0] if argv else None
    prog = "relora" if Path(sys.argv[0]).name == "relora" else "python -m relora_ds"
    if name == "train":
        from relora_ds.train import main as train

        return train(argv[1:], f"{prog} train")
    parser = argparse.ArgumentParser(prog=prog, description="ReLoRA pre-training on DeepSpeed ZeRO.")
    parser.add_argument("--version", action="version", version=f"relora_ds {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    parsers = {
        known: subparsers.add_parser(known, help=what, description=what) for known, (what, _) in COMMANDS.items()
    }
    if name not in COMMANDS:
        parser.parse_args(argv)  # prints the list, or names the mistake, and exits
    command = importlib.import_module(COMMANDS[name][1])  # only this one: torch takes seconds to import
    command.add_arguments(parsers[name])
    try:
        # Intermixed: overrides may stand before and after the options.
        return command.run(parsers[name].parse_intermixed_args(argv[1:]))
    except RecipeError as error:
        return _fail(error, 2)
    except (ValueError, OSError) as error:
        return _fail(error, 1)


def _fail(error: Exception, exit_code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

"""`python -m relora_ds checkpoint list|verify|prune RUN`."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relora_ds.checkpoint.manifest import Manifest

ACTIONS = {
    "list": "the checkpoints of a run, with what their manifests say",
    "verify": "read every file and compare it with its sha256; exit code 1 where one is damaged or cannot be read now",
    "prune": "delete all but the newest --keep-last, and those at multiples of --keep-every steps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"{name:<8}{what}" for name, what in ACTIONS.items())
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument("--keep-last", type=int, metavar="N", help="prune: how many of the newest stay (at least 1)")
    parser.add_argument("--keep-every", type=int, metavar="STEPS", help="prune: those at its multiples stay")


def run(arguments: argparse.Namespace) -> int:
    from relora_ds.checkpoint import manifest, store
    from relora_ds.checkpoint.earlier import refusal

    is_one = (arguments.run / manifest.NAME).is_file()
    found = [arguments.run] if is_one else store.directories(arguments.run) or store.tagged(arguments.run)
    if not found and (reason := refusal(arguments.run)):
        raise ValueError(reason)
    if not found:
        raise ValueError(f"{arguments.run}: it has no checkpoint; name a run directory or a checkpoint")
    if arguments.action == "list":
        return _list(found)
    if arguments.action == "verify":
        return _verify(found)
    if found == [arguments.run]:
        raise ValueError(f"{arguments.run}: is a checkpoint; name the run, or delete this one directory")
    return _prune(arguments)


def _list(found: list[Path]) -> int:
    from rich.console import Console
    from rich.table import Table

    from relora_ds.checkpoint import manifest
    from relora_ds.utils.text import human_bytes

    table, damaged = Table(box=None, padding=(0, 1, 0, 0)), []
    for column in ("checkpoint", "phase", "restarts", "ranks", "engine", "bytes", "written"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("restarts", "ranks", "bytes") else "left")
    for path in found:
        try:
            about = manifest.read(path)
        except (manifest.DamagedError, manifest.UnreadableError) as error:
            damaged.append(f"{path.name}: {error}")
            continue
        table.add_row(
            path.name,
            *_of_run(about),
            human_bytes(sum(file.size for file in about.files.values())),
            time.strftime("%Y-%m-%d %H:%M", time.localtime((path / manifest.NAME).stat().st_mtime)),
        )
    Console().print(table)
    print("\n".join(damaged), end="\n" if damaged else "")
    return 0


def _of_run(about: "Manifest") -> tuple[str, str, str, str]:
    """Return phase, restarts, ranks and engine; of a loop of its own, only the restarts are known."""
    run = about.run
    if not about.is_of_run:
        return "", str(len(about.engine["scheduler"]["restarts"])), "", ""
    engine = f"{run['recipe']['deepspeed']} {run['recipe']['precision']}"
    return run["phase"], str(run["account"]["restarts"]), str(run["world_size"]), engine


def _verify(found: list[Path]) -> int:
    from relora_ds.checkpoint import store

    damaged = 0
    for path in found:
        problems = store.verify(path)
        damaged += bool(problems)
        print(f"{path.name}: {'; '.join(problems) or 'intact'}", flush=True)
    return 1 if damaged else 0


def _prune(arguments: argparse.Namespace) -> int:
    from relora_ds.checkpoint import store

    if arguments.keep_last is None or arguments.keep_last < 1:
        raise ValueError(f"--keep-last: {arguments.keep_last} would leave no checkpoint; give at least 1")
    if arguments.keep_every is not None and arguments.keep_every < 1:
        raise ValueError(f"--keep-every: {arguments.keep_every} is not a number of steps; give at least 1")
    gone = store.prune(arguments.run, arguments.keep_last, arguments.keep_every, thorough=True)
    print("\n".join(f"deleted {path.name}" for path in gone) or "nothing to delete")
    return 0

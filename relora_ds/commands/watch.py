"""`python -m relora_ds watch`."""

import argparse
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directories, here or on a disk that is mounted here"
    )
    parser.add_argument(
        "--every",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="between looks at the files (default: %(default)g)",
    )
    parser.add_argument(
        "--once", action="store_true", help="print the state once and end; so it is where the output is no terminal"
    )


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from relora_ds.utils.files import short_names
    from relora_ds.watch.followed_run import FollowedRun
    from relora_ds.watch.screen import screen

    if not 0.1 <= arguments.every <= 3600:
        raise ValueError(f"--every: {arguments.every:g} is not between 0.1 and 3600 seconds; use for instance 2")
    directories = list(dict.fromkeys(path.absolute() for path in arguments.runs))
    runs = [FollowedRun(path, name) for path, name in zip(directories, short_names(directories), strict=True)]
    console = Console(highlight=False)

    def look():
        for one in runs:
            one.look()
        return screen(runs, console.width, console.height)

    if arguments.once or not console.is_terminal:
        console.print(look())
        return 0
    try:
        with Live(look(), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(arguments.every)
                live.update(look(), refresh=True)
    except KeyboardInterrupt:
        console.print(look())  # it stays in the terminal
    return 0

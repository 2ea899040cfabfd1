"""`python -m relora_ds plot`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; a run may still go on")
    parser.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR",
                        help="where to write index.html and the PNGs (default: %(default)s); older ones are replaced")


def run(arguments: argparse.Namespace) -> int:
    try:
        from relora_ds.figures.plot import plot_runs
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "matplotlib":
            raise
        raise ValueError("plot draws with matplotlib, which is not installed: pip install 'relora_ds[plot]'") from None
    page, *images = plot_runs(arguments.runs, arguments.out)
    print(f"{page}: open it in a browser; figures: {', '.join(image.name for image in images)}")
    return 0

"""`python -m relora_ds plot`."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relora_ds.lab.figures.run_history import read_runs
from relora_ds.lab.figures.sentences import sentences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; a run may still train")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("plots"),
        metavar="DIR",
        help="where to write index.html and the PNGs (default: %(default)s); older ones are replaced",
    )


def run(arguments: argparse.Namespace) -> int:
    runs = read_runs(arguments.runs)
    for each in runs:
        print("\n  ".join(sentences(each)), flush=True)  # matplotlib is slow to load, and may be missing
    with needs_matplotlib("plot"):
        from relora_ds.lab.figures.run_figures import plot_runs
    page, *images = plot_runs(runs, arguments.out)
    print(
        f"figures in {arguments.out}: {', '.join(image.name for image in images)}; {page.name} shows all in a browser"
    )
    return 0


@contextmanager
def needs_matplotlib(what: str) -> Iterator[None]:
    """Around an import of what draws. ValueError where matplotlib is not installed; it names `what` asked for it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ValueError(f"{what} draws with matplotlib, which is not installed: pip install '.[plot]'") from None

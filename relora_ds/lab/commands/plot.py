"""`python -m relora_ds plot`."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    with needs_matplotlib("plot"):
        from relora_ds.lab.figures.run_figures import plot_runs
    page, *images = plot_runs(arguments.runs, arguments.out)
    print(f"{page}: open it in a browser; figures: {', '.join(image.name for image in images)}")
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

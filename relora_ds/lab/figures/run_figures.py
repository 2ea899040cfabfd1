"""Runs to files: PNGs and the page."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from relora_ds.lab.figures.page import html_page
from relora_ds.lab.figures.panels import draw
from relora_ds.lab.figures.run_history import RunRecord
from relora_ds.lab.figures.style import DARK, LIGHT

DPI = 150


def plot_runs(runs: list[RunRecord], out: Path) -> list[Path]:
    """Draw these runs into `out`, a folder that is made if it is missing; returns the files, index.html first."""
    light, dark = ({name: png(figure) for name, figure in draw(runs, theme).items()} for theme in (LIGHT, DARK))
    out.mkdir(parents=True, exist_ok=True)
    files = {"index.html": html_page(runs, light, dark).encode(), **{f"{name}.png": png for name, png in light.items()}}
    for name, content in files.items():
        (out / name).write_bytes(content)
    return [out / name for name in files]


def png(figure: Figure) -> bytes:
    """Return the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()

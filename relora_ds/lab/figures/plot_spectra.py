"""Draw the results of `experiments.update_spectra`: the rank of runs' updates (arXiv 2307.05695, Figures 3 and 4)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from relora_ds.lab.figures.run_figures import DPI
from relora_ds.lab.figures.style import LIGHT, Theme, colour, dash, rc

COLUMNS = 4
BINS = 40
FLOOR = 1e-4  # of the largest singular value: what is below it is rounding


def save_spectra(result: dict, directory: Path) -> list[Path]:
    """Draw the result of `experiments.update_spectra.measure` into PNGs; the folder is made if it is missing."""
    figures = {directory / f"{name}.png": figure for name, figure in draw_spectra(result, LIGHT).items()}
    directory.mkdir(parents=True, exist_ok=True)
    for path, figure in figures.items():
        figure.savefig(path, format="png", dpi=DPI)
    return list(figures)


def draw_spectra(result: dict, theme: Theme) -> dict[str, Figure]:
    """`{file name without ending: figure}`: a panel for each kind of layer, a colour for each run."""
    with rc_context(rc(theme)):
        return {
            "singular_values": _histograms(result["runs"], theme),
            "singular_values_sorted": _sorted(result["runs"], result["share"], theme),
        }


def _histograms(runs: list[dict], theme: Theme) -> Figure:
    figure, panels = _panels(runs, "Singular values of the updates")
    for kind, axes in panels.items():
        values = {
            i: np.concatenate(run["kinds"][kind]["singular_values"])
            for i, run in enumerate(runs)
            if kind in run["kinds"]
        }
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), BINS)
        for i, mine in values.items():
            counts, _ = np.histogram(mine, edges)
            axes.stairs(counts, edges, fill=True, color=colour(theme, i), alpha=0.2)
            axes.stairs(counts, edges, color=colour(theme, i), linestyle=dash(i), linewidth=1.3)
        axes.set_yscale("log")  # a low-rank update has almost all of its values at 0
        axes.set_ylim(bottom=0.7)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.locator_params(axis="x", nbins=5)
    _label(panels, "singular value", "how many")
    _legend(figure, runs, theme)
    return figure


def _sorted(runs: list[dict], share: float, theme: Theme) -> Figure:
    figure, panels = _panels(runs, "Singular values of the updates, relative to the largest")
    for kind, axes in panels.items():
        axes.axhline(share, color=theme.ink, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.7)
        for i, run in enumerate(runs):
            if kind in run["kinds"]:
                _draw_sorted(axes, run, kind, i, theme)
        axes.set_yscale("log")
        axes.set_ylim(FLOOR, 1.5)
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
    _label(panels, "number of the singular value", "share of the largest")
    _legend(
        figure,
        runs,
        theme,
        [
            ("r", {"color": theme.ink, "linestyle": ":", "linewidth": 1.2}),
            (f"{share:g}: what counts as rank", {"color": theme.ink, "linestyle": (0, (2, 2)), "linewidth": 0.8}),
        ],
    )
    return figure


def _draw_sorted(axes: Axes, run: dict, kind: str, i: int, theme: Theme) -> None:
    """Thin lines are single matrices, the thick one their median."""
    curves = [np.array(one) / one[0] for one in run["kinds"][kind]["singular_values"] if one[0] > 0]
    for curve in curves:
        axes.plot(np.arange(1, len(curve) + 1), curve, color=colour(theme, i), linewidth=0.5, alpha=0.35)
    if curves:
        longest = max(map(len, curves))
        middle = np.nanmedian(
            [np.pad(curve, (0, longest - len(curve)), constant_values=np.nan) for curve in curves], axis=0
        )
        axes.plot(np.arange(1, longest + 1), middle, color=colour(theme, i), linestyle=dash(i), linewidth=1.8)
    if run["r"] is not None:
        axes.axvline(run["r"], color=colour(theme, i), linestyle=":", linewidth=1.2)


def _panels(runs: list[dict], title: str) -> tuple[Figure, dict[str, Axes]]:
    """Draw a panel for each kind of layer that one of the runs has."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run["kinds"]))
    columns = min(COLUMNS, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(9.6, 0.9 + 2.2 * rows), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in every[len(kinds) :]:
        axes.set_visible(False)
    panels = dict(zip(kinds, every, strict=False))
    for kind, axes in panels.items():
        axes.set_title(kind, fontsize=10)
    return figure, panels


def _label(panels: dict[str, Axes], x: str, y: str) -> None:
    """Along the lower and the left edge."""
    every = list(panels.values())
    columns = min(COLUMNS, len(every))
    for i, axes in enumerate(every):
        axes.tick_params(labelsize=8)
        if i >= len(every) - columns:
            axes.set_xlabel(x, fontsize=9)
        if i % columns == 0:
            axes.set_ylabel(y, fontsize=9)


def _legend(figure: Figure, runs: list[dict], theme: Theme, others: Sequence[tuple[str, dict]] = ()) -> None:
    entries = [
        (_label_of(run), {"color": colour(theme, i), "linestyle": dash(i), "linewidth": 2.4})
        for i, run in enumerate(runs)
    ] + list(others)
    figure.legend(
        [Line2D([], [], **how) for _, how in entries],
        [label for label, _ in entries],
        loc="outside lower left",
        ncols=min(len(entries), 5),
    )


def _label_of(run: dict) -> str:
    return run["name"] if run["r"] is None else f"{run['name']} (r {run['r']}, restarts {run['restarts']})"

"""The figures of a suite: losses over tokens, and final losses over what a sweep changes."""

from functools import reduce
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from relora_ds.lab.figures.page import suite_page
from relora_ds.lab.figures.plot_spectra import draw_spectra
from relora_ds.lab.figures.run_figures import png
from relora_ds.lab.figures.style import DARK, LIGHT, Theme, colour, dash, limits, rc, smoothed
from relora_ds.utils.text import human_count

LINEAR = 0.02  # nats per token: larger differences are drawn to a logarithmic scale
CAPTIONS = {
    "loss": "Loss in nats per token: training (smoothed; thick: the mean over the seeds, thin: one seed) and "
    "validation (points, one a seed).",
    "differences": "Training loss less the reference's, on the same batches: the mean over the seeds, and their range. "
    f"To scale up to {LINEAR} nats, logarithmic beyond.",
    "link": "Validation loss over what went in and out of an island, or of a rank of data parallel: points are seeds, "
    "lines join the means of one kind of run.",
    "singular_values": "Singular values of what training added to the weights, the first seed's.",
    "singular_values_sorted": "The same, each matrix relative to its largest and in order; thick: the median matrix.",
}


def save_suite(
    name: str,
    title: str,
    blocks: list,
    curves: dict[str, list[dict]],
    reference: str | None,
    sweeps: dict[str, dict],
    links: dict[str, list],
    spectra: dict | None,
    directory: Path,
) -> list[Path]:
    """Write what there is into `directory`: `NAME.html` with everything in it, and `NAME_*.png`; returns the files.

    Args:
        title, blocks: of the page, see `suite_page`.
        curves, sweeps, links: what `experiments.suite_report` makes of a suite.
        reference: the name of the curves that the others are compared with.
        spectra: of its runs, what `experiments.update_spectra.measure` returns.
    """
    light, dark = (_draw(curves, reference, sweeps, links, spectra, theme) for theme in (LIGHT, DARK))
    images = {figure: png(drawn) for figure, drawn in light.items()}
    page = suite_page(title, blocks, [(_caption(figure), images[figure], png(dark[figure])) for figure in images])
    files = {f"{name}.html": page.encode(), **{f"{name}_{figure}.png": image for figure, image in images.items()}}
    for file, content in files.items():
        (directory / file).write_bytes(content)
    return [directory / file for file in files]


def _caption(figure: str) -> str:
    return CAPTIONS.get(figure) or f"Validation loss by {figure.replace('_', ' ')}: points are seeds."


def _draw(
    curves: dict, reference: str | None, sweeps: dict, links: dict, spectra: dict | None, theme: Theme
) -> dict[str, Figure]:
    figures = {axis.replace(" ", "_"): draw_sweep(axis, groups, theme) for axis, groups in sweeps.items()}
    if curves:
        figures["loss"] = draw_curves(curves, theme)
    if reference is not None and reference in curves and len(curves) > 1:
        figures["differences"] = draw_differences(curves, reference, theme)
    if links:
        figures["link"] = draw_link(links, theme)
    return {**figures, **(draw_spectra(spectra, theme) if spectra else {})}


def draw_curves(curves: dict[str, list[dict]], theme: Theme) -> Figure:
    """Draw the smoothed training loss of every seed and their mean as lines; validation loss as points, one a seed."""
    with rc_context(rc(theme)):
        figure = Figure(figsize=(9.6, 4.8), layout="constrained")
        axes = figure.subplots()
        shown = []
        for i, (name, runs) in enumerate(curves.items()):
            hue, trained = colour(theme, i), [np.array(run["train_curve"]) for run in runs]
            length = min(map(len, trained))
            tokens = trained[0][:length, 0]
            seeds = [smoothed(tokens, one[:length, 1]) for one in trained]
            axes.plot(tokens, np.mean(seeds, axis=0), color=hue, linestyle=dash(i), linewidth=1.6, label=name)
            if len(seeds) > 1:  # what the seed changes
                axes.plot(tokens, np.transpose(seeds), color=hue, linewidth=0.6, alpha=0.5)
            shown += [(tokens, one) for one in seeds]
            for run in runs:
                points = np.array(run["curve"])
                axes.plot(
                    points[:, 0],
                    points[:, 1],
                    color=hue,
                    marker="o",
                    markersize=4,
                    linewidth=0,
                    markeredgecolor=theme.ground,
                    markeredgewidth=0.6,
                    zorder=3,
                )
                shown.append((points[:, 0], points[:, 1]))
        if found := limits(shown):
            axes.set_ylim(*found)
        axes.set_title("Loss: training (lines, smoothed), validation (points)")
        axes.set_ylabel("nats per token")
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(lambda value, _: human_count(value).replace(".00", ""))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=5)
    return figure


def draw_differences(curves: dict[str, list[dict]], reference: str, theme: Theme) -> Figure:
    """Training loss less the reference's of the same seed, which saw the same batches: the mean, and the range."""
    theirs = {run["seed"]: np.array(run["train_curve"]) for run in curves[reference]}
    with rc_context(rc(theme)):
        figure = Figure(figsize=(9.6, 4.8), layout="constrained")
        axes = figure.subplots()
        for i, (name, runs) in enumerate(curves.items()):
            pairs = [(np.array(run["train_curve"]), theirs[run["seed"]]) for run in runs if run["seed"] in theirs]
            if name == reference or not pairs:
                continue
            # Where both have points: only then are they means over the same batches.
            tokens = reduce(np.intersect1d, [curve[:, 0] for pair in pairs for curve in pair])
            differences = np.array(
                [mine[np.isin(mine[:, 0], tokens), 1] - their[np.isin(their[:, 0], tokens), 1] for mine, their in pairs]
            )
            axes.plot(
                tokens, differences.mean(axis=0), color=colour(theme, i), linestyle=dash(i), linewidth=1.6, label=name
            )
            axes.fill_between(
                tokens,
                differences.min(axis=0),
                differences.max(axis=0),
                color=colour(theme, i),
                alpha=0.25,
                linewidth=0,
            )
        axes.axhline(0, color=theme.ink, linewidth=0.8)
        axes.set_yscale("symlog", linthresh=LINEAR)  # small leads beside large ones
        axes.set_title(f"Training loss less {reference}'s")
        axes.set_ylabel("nats per token")
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(lambda value, _: human_count(value).replace(".00", ""))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=5)
    return figure


def draw_sweep(axis: str, groups: dict[str, list[tuple[float, list[float]]]], theme: Theme) -> Figure:
    """Draw the final validation loss over one quantity: a line through the means, points for the seeds."""
    with rc_context(rc(theme)):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        values = sorted({value for found in groups.values() for value, _ in found})
        for i, (name, found) in enumerate(groups.items()):
            places = [values.index(value) for value, _ in found]  # evenly spaced: 0.9 and 0.999 are far apart
            axes.plot(
                places,
                [np.mean(losses) for _, losses in found],
                color=colour(theme, i),
                linestyle=dash(i),
                linewidth=1.6,
                label=name,
            )
            points = [(place, one) for place, (_, losses) in zip(places, found, strict=True) for one in losses]
            axes.plot(*zip(*points, strict=True), color=colour(theme, i), marker="o", markersize=4, linewidth=0)
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set_title(f"Validation loss by {axis}")
        axes.set_xlabel(axis)
        axes.set_ylabel("nats per token")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def draw_link(groups: dict[str, list[tuple[float, list[float]]]], theme: Theme) -> Figure:
    """Draw the final validation loss over the bytes that a link carried, to a logarithmic scale.

    Args:
        groups: of each kind of run `(bytes, losses by seed)`.
    """
    with rc_context(rc(theme)):
        figure = Figure(figsize=(9.6, 5.4), layout="constrained")
        axes = figure.subplots()
        for i, (name, found) in enumerate(groups.items()):
            found = sorted(found)
            axes.plot(
                [sent for sent, _ in found],
                [np.mean(losses) for _, losses in found],
                color=colour(theme, i),
                linestyle=dash(i),
                linewidth=1.6,
                label=name,
            )
            points = [(sent, one) for sent, losses in found for one in losses]
            axes.plot(*zip(*points, strict=True), color=colour(theme, i), marker="o", markersize=4, linewidth=0)
        axes.set_xscale("log")
        axes.set_title("Validation loss by bytes over the link")
        axes.set_xlabel("bytes over a run")
        axes.set_ylabel("nats per token")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure

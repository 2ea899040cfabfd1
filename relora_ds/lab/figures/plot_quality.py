"""The figure of `bench quality`: validation loss over tokens by storage format, and the difference to the reference."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from relora_ds.lab.figures.run_figures import DPI
from relora_ds.lab.figures.style import LIGHT, Theme, colour, dash, rc
from relora_ds.utils.text import human_count


def save_quality(result: dict, path: Path) -> None:
    """Draw the result of `bench.quality.run` into a PNG; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(rc(LIGHT)):
        draw_quality(result, LIGHT).savefig(path, format="png", dpi=DPI)


def draw_quality(result: dict, theme: Theme) -> Figure:
    """Thin lines are single seeds, thick ones their mean."""
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    reference = result["reference"]
    base = _losses(result["variants"][reference])
    for i, (name, found) in enumerate(result["variants"].items()):
        tokens, curves = _tokens(found), _losses(found)
        shown = [(losses, curves)] + ([] if name == reference else [(differences, 100 * (curves / base - 1))])
        for axes, values in shown:
            for one in values:
                axes.plot(tokens, one, color=colour(theme, i), linewidth=0.6, alpha=0.4)
            axes.plot(
                tokens,
                values.mean(axis=0),
                color=colour(theme, i),
                linestyle=dash(i),
                linewidth=1.8,
                marker="o",
                markersize=3.5,
                label=name if axes is losses else None,
            )
    losses.set_title("Validation loss")
    losses.set_ylabel("nats per token")
    differences.set_title(f"Difference to {reference}, per cent")
    differences.axhline(0, color=theme.ink, linewidth=0.9)
    for axes in (losses, differences):
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(lambda value, _: human_count(value).replace(".00", ""))
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


def _tokens(found: dict) -> np.ndarray:
    return np.array([tokens for tokens, _ in found["runs"][0]["curve"]])


def _losses(found: dict) -> np.ndarray:
    """`[seed, evaluation]`."""
    return np.array([[loss for _, loss in one["curve"]] for one in found["runs"]])

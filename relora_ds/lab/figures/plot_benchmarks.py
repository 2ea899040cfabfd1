"""The figures of `bench two-hosts` and `bench clusters`."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from relora_ds.lab.figures.run_figures import DPI
from relora_ds.lab.figures.style import DASHES, LIGHT, Theme, colour, rc

PARTS = {"compute_s": "compute", "optimizer_s": "optimizer", "communication_s": "communication"}


def save_two_hosts(result: dict, path: Path) -> None:
    """Draw what `bench.two_hosts.with_predictions` returns into a PNG."""
    _save(draw_two_hosts, result, path)


def save_clusters(result: dict, path: Path) -> None:
    """Draw the result of `bench.clusters.run` into a PNG."""
    _save(draw_clusters, result, path)


def _save(draw, result: dict, path: Path) -> None:
    with rc_context(rc(LIGHT)):
        draw(result, LIGHT).savefig(path, format="png", dpi=DPI)


def draw_two_hosts(result: dict, theme: Theme) -> Figure:
    """Draw a panel for each shape and link, a bar for each variant by parts of its step; marks are predictions."""
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    rates = list(dict.fromkeys(row["rate"] for row in result["rows"]))
    names = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    figure = Figure(figsize=(3.6 * len(rates) + 1.2, 0.4 * len(names) * len(shapes) + 1.8), layout="constrained")
    panels = figure.subplots(len(shapes), len(rates), sharey=True, squeeze=False)
    for shape, line in zip(shapes, panels, strict=True):
        for rate, axes in zip(rates, line, strict=True):
            found = {row["variant"]: row for row in result["rows"] if (row["shape"], row["rate"]) == (shape, rate)}
            left = [0.0] * len(names)
            for i, (part, label) in enumerate(PARTS.items()):
                width = [found[name][part] for name in names]
                axes.barh(names, width, left=left, color=colour(theme, i), label=label, height=0.62)
                left = [start + more for start, more in zip(left, width, strict=True)]
            axes.plot(
                [found[name]["predicted_s"] for name in names],
                names,
                linestyle="none",
                marker="|",
                markersize=13,
                markeredgewidth=2,
                color=theme.ink,
                label="predicted",
            )
            axes.set_title(f"{shape}, {rate / 1e6:,.0f} Mbit/s" if rate else shape)
            axes.grid(False, axis="y")
            axes.set_xlim(left=0)
    panels[0][0].set_ylim(len(names) - 0.5, -0.5)  # shared: the first variant on top
    for axes in panels[-1]:
        axes.set_xlabel("seconds of a step")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=4 if len(rates) > 1 else 2)
    return figure


def draw_clusters(result: dict, theme: Theme) -> Figure:
    """Predicted speed over full rank by the network between hosts; a colour for each number of GPUs."""
    presets = list(dict.fromkeys(row["preset"] for row in result["rows"]))
    figure = Figure(figsize=(4.8 * len(presets) + 0.6, 4.4), layout="constrained")
    panels = figure.subplots(1, len(presets), sharey=True, squeeze=False)[0]
    inside = [row for row in result["rows"] if row["hosts"] < row["gpus"] and row["network_gbits"]]
    sizes = list(dict.fromkeys(row["gpus"] for row in inside))
    methods = [name for name in dict.fromkeys(row["method"] for row in inside) if name != "full rank"]
    for preset, axes in zip(presets, panels, strict=True):
        for i, gpus in enumerate(sizes):
            for j, method in enumerate(methods):
                rows = {
                    (row["method"], row["network_gbits"]): row
                    for row in inside
                    if row["preset"] == preset and row["gpus"] == gpus and "error" not in row
                }
                speeds = [
                    (gbits, rows["full rank", gbits]["seconds"] / row["seconds"])
                    for (name, gbits), row in rows.items()
                    if name == method and ("full rank", gbits) in rows
                ]
                if speeds:
                    axes.plot(
                        *zip(*speeds, strict=True),
                        color=colour(theme, i),
                        linestyle=DASHES[j],
                        marker="o",
                        markersize=4,
                        label=f"{gpus:,} GPUs, {method}",
                    )
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = sorted({row["network_gbits"] for row in inside})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([1, 2, 4, 8, 16], ["1x", "2x", "4x", "8x", "16x"])
        axes.minorticks_off()
        axes.set_title(preset)
        axes.set_xlabel("Gbit/s that a host of 8 GPUs sends")
    panels[0].set_ylabel("predicted speed, full rank = 1")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure

"""The figures themselves. Each function draws one, for one run or for several, and returns it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from relora_ds.lab.figures.run_history import RunRecord, value_at
from relora_ds.lab.figures.style import Theme, colour, dash, is_smoothed, limits, rc, smoothed
from relora_ds.utils.text import human_bytes, human_count

AXES = {"step": "step", "tokens": "tokens", "total_bytes_wire": "bytes sent by each rank"}
FORMATS = {"tokens": human_count, "total_bytes_wire": human_bytes}
RESTART = "restart: s·B·A is merged into W"
MOST_RAW_RUNS = 3  # with more, the unsmoothed losses would cover each other


def draw(runs: list[RunRecord], theme: Theme) -> dict[str, Figure]:
    """`{file name without ending: figure}` of everything that these runs have the data for."""
    wanted: dict[str, Callable] = {"loss": _loss, "learning_rate": _learning_rate, "throughput": _throughput}
    if any(run.has_traffic for run in runs):
        wanted["traffic"] = _traffic
    if len(runs) > 1:
        wanted["comparison"] = _comparison
    with rc_context(rc(theme)):
        return {name: function(runs, theme) for name, function in wanted.items()}


def _loss(runs: list[RunRecord], theme: Theme) -> Figure:
    """Over tokens; of several runs over steps, because `_comparison` has their tokens."""
    figure, (axes,) = _figure(height=4.6)
    axes.set_title(_title("Loss", runs))
    axes.set_ylabel("nats per token")
    scale = "tokens" if len(runs) == 1 else "step"
    _draw_loss(axes, runs, theme, scale)
    _mark(axes, runs, theme, scale)
    smooth = ", smoothed" if any(is_smoothed(run.train["loss"]) for run in runs) else ""
    signs: list[tuple[str, dict]] = [(f"training{smooth}", {"linewidth": 1.6})]
    if any(len(run.evaluations["step"]) for run in runs):
        own = {"color": _of_validation(runs, theme, 0)} if len(runs) == 1 else {}
        signs.append(("validation", {"marker": "o", "linewidth": 0, "markersize": 5, **own}))
    _legend(axes, runs, theme, signs)
    return figure


def _learning_rate(runs: list[RunRecord], theme: Theme) -> Figure:
    figure, (axes,) = _figure()
    axes.set_title(_title("Learning rate", runs))
    for i, run in enumerate(runs):
        axes.plot(run.train["step"], run.train["lr"], color=colour(theme, i), linestyle=dash(i), linewidth=1.4)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    _mark(axes, runs, theme)
    _legend(axes, runs, theme)
    return figure


def _throughput(runs: list[RunRecord], theme: Theme) -> Figure:
    figure, (axes,) = _figure()
    axes.set_title(_title("Tokens per second, all ranks together", runs))
    tops = []
    for i, run in enumerate(runs):
        steps, speeds = run.train["step"], run.train["tokens_per_s"]
        if len(runs) <= MOST_RAW_RUNS:
            axes.plot(steps, speeds, color=colour(theme, i), linewidth=0.8, alpha=0.3)
        axes.plot(steps, smoothed(steps, speeds), color=colour(theme, i), linestyle=dash(i), linewidth=1.6)
        tops.append(np.nanquantile(speeds, 0.98))
    axes.set_ylim(0, 1.15 * max(tops))
    axes.yaxis.set_major_formatter(_ticks(human_count))
    _mark(axes, runs, theme)
    _legend(axes, runs, theme)
    return figure


def _traffic(runs: list[RunRecord], theme: Theme) -> Figure:
    figure, (axes,) = _figure()
    axes.set_title(_title("Sent by each rank so far", runs))
    for i, run in enumerate(runs):
        steps, sent, full = (run.train[column] for column in ("step", "total_bytes_wire", "full_rank_bytes_wire"))
        axes.plot(steps, full, color=theme.ink, linestyle=(0, (2, 2)), linewidth=1, alpha=0.7)
        axes.plot(steps, sent, color=colour(theme, i), linestyle=dash(i), linewidth=1.8)
        if len(runs) == 1 and sent[-1] > 0:
            axes.fill_between(steps, sent, full, color=colour(theme, i), alpha=0.12, linewidth=0)
            axes.annotate(
                f"full rank: {full[-1] / sent[-1]:.2f}x",
                (steps[-1], (sent[-1] + full[-1]) / 2),
                xytext=(-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
            )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_ticks(human_bytes))
    _mark(axes, runs, theme)
    _legend(
        axes,
        runs,
        theme,
        [("what full rank would have sent", {"color": theme.ink, "linestyle": (0, (2, 2)), "linewidth": 1})],
    )
    return figure


def _comparison(runs: list[RunRecord], theme: Theme) -> Figure:
    """Loss over what it cost: tokens and, where something was sent, bytes."""
    scales = ["tokens", *(["total_bytes_wire"] if any(run.has_traffic for run in runs) else [])]
    figure, panels = _figure(height=4.2, columns=len(scales))
    for axes, scale in zip(panels, scales, strict=True):
        axes.set_title(f"Loss over {AXES[scale]}")
        _draw_loss(axes, [run if scale == "tokens" or run.has_traffic else None for run in runs], theme, scale)
        _label_x(axes, scale)
        axes.locator_params(axis="x", nbins=5)
    _legend(panels[0], runs, theme, marks=False)
    return figure


def _draw_loss(axes: Axes, runs: Sequence[RunRecord | None], theme: Theme, scale: str) -> None:
    """Train and validation losses over one of AXES; a run that is None is left out."""
    curves = []
    present = [run for run in runs if run is not None]
    for i, run in enumerate(runs):
        if run is None:
            continue
        hue, x, losses = colour(theme, i), run.train[scale], smoothed(run.train["step"], run.train["loss"])
        if len(present) <= MOST_RAW_RUNS and is_smoothed(losses):
            axes.plot(x, run.train["loss"], color=hue, linewidth=0.7, alpha=0.25)
        axes.plot(x, losses, color=hue, linestyle=dash(i), linewidth=1.6)
        axes.plot(
            run.evaluations[scale],
            run.evaluations["val_loss"],
            color=_of_validation(runs, theme, i),
            marker="o",
            markersize=5,
            linewidth=0,
            markeredgecolor=theme.ground,
            markeredgewidth=0.8,
            zorder=3,
        )
        curves += [(run.train["step"], losses), (run.evaluations["step"], run.evaluations["val_loss"])]
    if shown := limits(curves):
        axes.set_ylim(*shown)


def _of_validation(runs: Sequence[RunRecord | None], theme: Theme, index: int) -> str:
    """Return the colour of validation losses: a single run has no other use for the second one."""
    return colour(theme, 1 if len(runs) == 1 else index)


def _label_x(axes: Axes, scale: str) -> None:
    axes.set_xlabel(AXES[scale])
    if scale in FORMATS:
        axes.xaxis.set_major_formatter(_ticks(FORMATS[scale]))


def _mark(axes: Axes, runs: list[RunRecord], theme: Theme, scale: str = "step") -> None:
    """Draw restarts and phase transitions: lines through a single run's figure, ticks along that of several runs."""
    _label_x(axes, scale)
    axes.set_xlim(0, 1.01 * max(run.train[scale][-1] for run in runs))
    for i, run in enumerate(runs):
        if len(runs) == 1:
            for steps, line in ((run.restarts, ":"), (run.transitions, "-")):
                for x in value_at(run.train, scale, steps):
                    axes.axvline(x, color=theme.ink, linestyle=line, linewidth=0.9, alpha=0.6, zorder=1)
        else:
            axes.plot(
                run.restarts,
                [0.015 + 0.03 * i] * len(run.restarts),
                color=colour(theme, i),
                marker="|",
                markersize=7,
                markeredgewidth=1.6,
                linewidth=0,
                transform=axes.get_xaxis_transform(),
                zorder=4,
            )


def _legend(
    axes: Axes, runs: list[RunRecord], theme: Theme, others: Sequence[tuple[str, dict]] = (), marks: bool = True
) -> None:
    """Below the axes: colours name the runs (a single one is named in the title), signs say what is drawn.

    Args:
        marks: whether `_mark` has drawn restarts and phase transitions here.
    """
    entries: list[tuple[str, dict[str, Any]]] = [
        (run.name, {"color": colour(theme, i), "linestyle": dash(i), "linewidth": 2.4})
        for i, run in enumerate(runs)
        if len(runs) > 1
    ]
    entries += [(label, {"color": theme.ink if len(runs) > 1 else colour(theme, 0), **how}) for label, how in others]
    if marks and any(run.restarts for run in runs):
        sign = (
            {"linestyle": ":", "linewidth": 1}
            if len(runs) == 1
            else {"marker": "|", "markersize": 7, "markeredgewidth": 1.6, "linewidth": 0}
        )
        entries.append((RESTART, {"color": theme.ink, **sign}))
    if marks and len(runs) == 1 and runs[0].transitions:
        entries.append(("end of the warm start", {"color": theme.ink, "linewidth": 0.9}))
    if not entries:
        return
    axes.figure.legend(
        [Line2D([], [], **how) for _, how in entries],
        [label for label, _ in entries],
        loc="outside lower left",
        ncols=min(len(entries), 5),
    )


def _title(text: str, runs: list[RunRecord]) -> str:
    return f"{text} · {runs[0].name}" if len(runs) == 1 else text


def _ticks(show: Callable[[float], str]) -> FuncFormatter:
    return FuncFormatter(lambda value, _: show(value).replace(".00", ""))


def _figure(height: float = 3.4, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.6, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])

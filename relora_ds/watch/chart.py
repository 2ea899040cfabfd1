"""The losses of runs over their steps, drawn with characters."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.util import find_spec

from relora_ds.watch.followed_run import FollowedRun

BEGINNING = 0.05  # of the points, which are far above the rest: the axis begins below them


def chart(runs: Sequence[FollowedRun], width: int, height: int) -> list[str]:
    """Return the lines of a chart: training losses, the validation losses of a run alone, its restarts as verticals.

    [] where there is nothing to draw yet, or uniplot is not installed (`is_available`).
    """
    curves = [(run.name, curve_of(run, width)) for run in runs]
    if len(runs) == 1:
        curves = [("training loss", curves[0][1]), ("validation loss", _points(runs[0].lines["eval"], "val_loss"))]
    curves = [(name, points) for name, points in curves if len(points) > 1]
    if not curves or not is_available():
        return []
    from uniplot import plot_to_string

    shown = [loss for _, points in curves for _, loss in points[int(BEGINNING * len(points)) :]]
    margin = 0.05 * (max(shown) - min(shown)) or 0.1
    drawn = plot_to_string(
        xs=[[step for step, _ in points] for _, points in curves],
        ys=[[loss for _, loss in points] for _, points in curves],
        lines=True,
        legend_labels=[name for name, _ in curves],
        character_set="braille",
        color=True,
        width=width - 12,  # and the labels beside the axis
        height=height,
        y_min=min(shown) - margin,
        y_max=max(shown) + margin,
        x_gridlines=[line["step"] for line in runs[0].lines["restart"]][-20:] if len(runs) == 1 else [],
        y_gridlines=[],
    )
    return drawn if isinstance(drawn, list) else drawn.splitlines()


def is_available() -> bool:
    """Return whether uniplot, which draws, is installed."""
    return find_spec("uniplot") is not None


def curve_of(run: FollowedRun, points: int) -> list[tuple[float, float]]:
    """Return (step, loss) of training, at most so many points: each the mean of some logged steps."""
    logged = _points(run.lines["train"], "loss")
    size = max(1, -(-len(logged) // points), min(10, len(logged) // 20))
    parts = [logged[i : i + size] for i in range(0, len(logged), size)]
    return [(part[-1][0], statistics.mean(loss for _, loss in part)) for part in parts]


def _points(lines: Sequence[dict], value: str) -> list[tuple[float, float]]:
    return [(line["step"], line[value]) for line in lines if line.get(value) is not None]

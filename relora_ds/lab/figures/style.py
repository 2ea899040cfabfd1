"""How figures look: colours for colour-blind readers, on light and on dark ground; smoothing; limits."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Theme:
    """Colours of one ground. `runs`: Okabe and Ito's palette without its yellow and black; the same order in both."""

    ground: str
    ink: str
    faint: str
    runs: tuple[str, ...]


LIGHT = Theme("#ffffff", "#24292f", "#c9d1d9", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"))
DARK = Theme("#14181d", "#d7dde4", "#3a434d", ("#4da9e0", "#ff8b4d", "#2cc79a", "#e79ac6", "#f2be4e", "#9ad4f5"))
DASHES = ("-", "--", ":")  # runs beyond the number of colours

SKIPPED_SHARE = 0.05  # of the steps: the fall from ln(vocabulary) would press all that follows to the bottom


def rc(theme: Theme) -> dict:
    """matplotlib's settings for a theme."""
    return {
        "figure.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "grid.alpha": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "font.size": 10,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.solid_capstyle": "round",
    }


def colour(theme: Theme, index: int) -> str:
    """Return the colour of run number `index`."""
    return theme.runs[index % len(theme.runs)]


def dash(index: int) -> str:
    """Line style of run number `index`."""
    return DASHES[index // len(LIGHT.runs) % len(DASHES)]


def smoothed(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of 1/25 of the steps; NaNs do not count. Few points stay as they are.

    Centred, because a trailing mean would show everything too late, restarts included. Over steps and not over
    points, because after a restart every step is logged, whatever `log.every` says.
    """
    if not is_smoothed(values):
        return values
    half = max((steps[-1] - steps[0]) / 50, 2 * float(np.median(np.diff(steps))))
    first, last = np.searchsorted(steps, steps - half, "left"), np.searchsorted(steps, steps + half, "right")
    known = np.isfinite(values)
    totals, counts = (np.concatenate([[0], np.cumsum(v)]) for v in (np.where(known, values, 0), known))
    count = counts[last] - counts[first]
    return np.where(count > 0, (totals[last] - totals[first]) / np.maximum(count, 1), np.nan)


def is_smoothed(values: np.ndarray) -> bool:
    """Return whether there are enough points for `smoothed` to change them."""
    return len(values) >= 20


def limits(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float] | None:
    """y limits for curves `(steps, values)`, without the fall of the first steps; None: let matplotlib choose."""
    last = max(float(steps[-1]) for steps, _ in curves if len(steps))
    shown = np.concatenate([values[steps >= SKIPPED_SHARE * last] for steps, values in curves])
    shown = shown[np.isfinite(shown)]
    if not len(shown) or shown.min() == shown.max():
        return None
    margin = 0.05 * (shown.max() - shown.min())
    return float(shown.min() - margin), float(shown.max() + margin)

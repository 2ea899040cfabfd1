"""Draw the picture of the first page of the docs: `python -m tests.docs.picture`.

It shows one run of a shipped recipe; every number comes from the recipe.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relora_ds.config import load_recipe, method_of
from relora_ds.lab.figures.style import LIGHT, colour, rc
from relora_ds.lowrank.schedule import lr_multiplier
from tests.docs.pages import DOCS
from tests.recipe_figures import figures

RECIPE = "llama_350m_relora_20k"
PICTURE = DOCS / "assets" / "run.png"


@dataclass(frozen=True)
class Run:
    """The curves of a run, one value a step.

    Attributes:
        restarts: the steps after which one takes place.
        trainable: parameters in millions, at full rank and in the low-rank phase.
        ranks: of the sum of all updates of a matrix, at the end of each cycle.
    """

    lr: np.ndarray
    warm_start: int
    restarts: list[int]
    trainable: tuple[float, float]
    ranks: list[int]


def run_of(name: str) -> Run:
    """Return the run that a shipped recipe describes."""
    recipe, low, full = load_recipe(name, check_files=False), figures(name), figures(name.split("_relora")[0] + "_full")
    optim, warm = recipe.optim, low.warm_start
    first = [
        (optim.warm_start_lr or optim.lr)
        * lr_multiplier(
            k,
            total_steps=recipe.total_steps,
            warmup_steps=optim.warm_start_warmup_steps or optim.warmup_steps,
            min_lr_ratio=optim.min_lr_ratio,
        )
        for k in range(warm)
    ]
    second = [
        optim.lr
        * lr_multiplier(
            k,
            total_steps=method_of(recipe).low_rank_steps,
            warmup_steps=optim.warmup_steps,
            restart_every=recipe.relora.restart_every,
            restart_warmup_steps=recipe.relora.restart_warmup_steps,
            min_lr_ratio=optim.min_lr_ratio,
        )
        for k in range(method_of(recipe).low_rank_steps)
    ]
    ranks = [recipe.relora.r * (k + 1) for k in range(len(low.restarts) + 1)]
    return Run(np.array(first + second), warm, low.restarts, (full.trainable / 1e6, low.trainable / 1e6), ranks)


def draw(run: Run) -> Figure:
    """Return the picture: learning rate, what trains, and the rank of the updates, over the steps."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    rate, trained, rank = figure.subplots(3, 1, sharex=True, height_ratios=(1.25, 1, 1))
    steps, total = np.arange(len(run.lr)), len(run.lr)
    warm, edges = run.warm_start, [run.warm_start, *run.restarts, len(run.lr)]
    before, after = colour(LIGHT, 0), colour(LIGHT, 1)

    rate.plot(steps[:warm], 1e3 * run.lr[:warm], color=before)
    rate.plot(steps[warm:], 1e3 * run.lr[warm:], color=after)
    rate.set_title("Learning rate × 1000")
    for step in run.restarts:
        rate.text(step - 0.008 * total, 0.03, "restart: W ← W + s·B·A", ha="right", va="bottom")
    _steps(trained, [0, warm, total], [*run.trainable], [before, after])
    trained.set_title("Parameters that train, have Adam state and are sent between GPUs (millions)")
    labels = (f"every weight of W: {run.trainable[0]:.0f}", f"A, B, embeddings, head, norms: {run.trainable[1]:.0f}")
    for label, start, height in zip(labels, (0, warm), run.trainable, strict=True):
        trained.text(start + 0.01 * total, height - 0.06 * run.trainable[0], label, va="top")
    trained.set_ylim(0, 1.1 * run.trainable[0])
    _steps(rank, edges, run.ranks, [after] * len(run.ranks))
    rank.set_title("Rank of the sum of all low-rank updates, at most")
    rank.set_yticks(run.ranks)
    rank.set_ylim(0, 1.1 * run.ranks[-1])
    rank.text(0.01 * total, 0.1 * run.ranks[-1], "warm start at full rank", va="bottom")
    rank.set_xlabel("step")
    rank.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in (rate, trained, rank):
        axes.set_xlim(0, total)
        for step in edges[:-1]:
            axes.axvline(step, color=LIGHT.ink, linewidth=0.7, linestyle=":")
    return figure


def _steps(axes: Axes, edges: list[int], heights: list[float], colours: list[str]) -> None:
    for start, stop, height, shade in zip(edges[:-1], edges[1:], heights, colours, strict=True):
        axes.fill_between([start, stop], 0, height, color=shade, alpha=0.25, linewidth=0)
        axes.plot([start, stop], [height, height], color=shade)


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    with rc_context(rc(LIGHT)):
        draw(run_of(RECIPE)).savefig(PICTURE, dpi=130)

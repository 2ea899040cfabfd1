"""The figures of a suite."""

import numpy as np

from relora_ds.lab.figures.plot_experiments import draw_curves, draw_differences, draw_link
from relora_ds.lab.figures.style import LIGHT


def run(seed: int, *losses: float) -> dict:
    return {"seed": seed, "train_curve": [[512.0 * (i + 1), loss] for i, loss in enumerate(losses)], "curve": []}


def test_of_several_seeds_each_is_shown_and_the_mean():
    curves = {"two seeds": [run(0, 5.0, 4.0), run(1, 7.0, 6.0)], "one": [run(0, 3.0, 2.0)]}
    for one in (one for runs in curves.values() for one in runs):
        one["curve"] = [[1024.0, 2.5]]
    axes = draw_curves(curves, LIGHT).axes[0]
    mean, *seeds, first, second, alone, _ = axes.lines
    assert [line.get_label() for line in axes.lines if not line.get_label().startswith("_")] == ["two seeds", "one"]
    assert mean.get_ydata().tolist() == [6.0, 5.0] and alone.get_ydata().tolist() == [3.0, 2.0]
    assert [line.get_ydata().tolist() for line in seeds] == [[5.0, 4.0], [7.0, 6.0]]
    assert all(line.get_linewidth() < mean.get_linewidth() for line in seeds)
    assert [line.get_marker() for line in (first, second)] == ["o", "o"]


def test_differences_are_of_the_same_seed():
    curves = {
        "theirs": [run(0, 5.0, 4.0), run(1, 7.0, 6.0)],
        "mine": [run(1, 6.9, 6.3), run(0, 5.1, 4.1), run(2, 1.0, 1.0)],  # nothing to compare the last one with
        "alone": [run(3, 5.0, 4.0)],
    }
    curves["mine"][0]["train_curve"].insert(1, [700.0, 0.0])  # theirs has no point there
    axes = draw_differences(curves, "theirs", LIGHT).axes[0]
    mine, zero = axes.lines
    assert mine.get_label() == "mine" and mine.get_xdata().tolist() == [512, 1024]
    np.testing.assert_allclose(mine.get_ydata(), [0.0, 0.2], atol=1e-9)
    band = axes.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [-0.1, 0.3], atol=1e-9)
    assert zero.get_ydata() == [0, 0]


def test_losses_over_a_link_are_joined_in_the_order_of_bytes():
    figure = draw_link({"islands": [(4000, [3.0, 3.2]), (1000, [3.5])], "full rank, 2 ranks": [(9000, [2.9])]}, LIGHT)
    (axes,) = figure.axes
    line, seeds, other, _ = axes.lines
    assert axes.get_xscale() == "log" and (line.get_label(), other.get_label()) == ("islands", "full rank, 2 ranks")
    assert list(line.get_xdata()) == [1000, 4000]
    np.testing.assert_allclose(line.get_ydata(), [3.5, 3.1])
    assert list(zip(seeds.get_xdata(), seeds.get_ydata(), strict=True)) == [(1000, 3.5), (4000, 3.0), (4000, 3.2)]

"""The figures of singular values."""

import pytest

from relora_ds.lab.figures.plot_spectra import draw_spectra
from relora_ds.lab.figures.style import LIGHT


def kind(*singular_values: list[float]) -> dict:
    return {"singular_values": list(singular_values)}


def result() -> dict:
    low = {
        "name": "low",
        "r": 2,
        "restarts": 3,
        "kinds": {"q_proj": kind([0.4, 0.2, 0, 0], [0.2, 0.1, 0, 0]), "up_proj": kind([0.0, 0.0, 0.0])},
    }
    full = {
        "name": "full",
        "r": None,
        "restarts": 0,
        "kinds": {"q_proj": kind([0.5, 0.4, 0.3, 0.2]), "dense": kind([0.3, 0.2])},
    }
    return {"share": 0.01, "small": 0.1, "runs": [low, full]}


def test_a_panel_for_each_kind_and_a_colour_for_each_run():
    figures = draw_spectra(result(), LIGHT)
    assert list(figures) == ["singular_values", "singular_values_sorted"]
    for figure in figures.values():
        shown = [axes.get_title("left") for axes in figure.axes if axes.get_visible()]
        assert shown == ["q_proj", "up_proj", "dense"]
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names[:2] == ["low (r 2, restarts 3)", "full"]


def test_the_sorted_values_are_of_the_largest_and_r_is_marked():
    axes = draw_spectra(result(), LIGHT)["singular_values_sorted"].axes[0]
    medians = {line.get_color(): list(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 1.8}
    assert medians == {LIGHT.runs[0]: pytest.approx([1, 0.5, 0, 0]), LIGHT.runs[1]: pytest.approx([1, 0.8, 0.6, 0.4])}
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert marks == [2]

"""What is drawn, and the page."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from relora_ds.lab.figures.panels import draw
from relora_ds.lab.figures.run_figures import plot_runs
from relora_ds.lab.figures.run_history import read_runs
from relora_ds.lab.figures.style import DARK, LIGHT, limits, smoothed
from relora_ds.training import run_contents
from tests.lab.figures.runs import RESTARTS, write_run

PNG = b"\x89PNG\r\n\x1a\n"


def vertical_lines(axes) -> list[float]:
    return [
        line.get_xdata()[0]
        for line in axes.lines
        if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]
    ]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def test_a_single_run_marks_its_restarts_and_its_switch(tmp_path):
    figures = draw(read_runs([write_run(tmp_path / "mine")]), LIGHT)
    assert list(figures) == ["loss", "learning_rate", "throughput", "traffic"]
    for name, figure in figures.items():
        unit = 64 if name == "loss" else 1
        assert vertical_lines(figure.axes[0]) == [unit * step for step in (*RESTARTS, 40)]
        assert "mine" in figure.axes[0].get_title("left")
        assert legend(figure)[-2:] == ["restart: s·B·A is merged into W", "end of the warm start"]


def test_the_loss_of_a_single_run_is_over_tokens(tmp_path):
    figure = draw(read_runs([write_run(tmp_path / "r")]), LIGHT)["loss"]
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "nats per token")
    assert legend(figure)[:2] == ["training, smoothed", "validation"]
    raw, training, validation = (line for line in axes.lines if len(line.get_xdata()) > 2)
    assert validation.get_xdata().tolist() == [64 * step for step in (40, 80, 120, 160, 200)]
    assert training.get_xdata()[-1] == raw.get_xdata()[-1] == 64 * 200
    assert training.get_color() == LIGHT.runs[0] and validation.get_color() == LIGHT.runs[1]
    assert axes.get_facecolor() == axes.figure.get_facecolor() == (1, 1, 1, 1)


def test_the_first_steps_do_not_press_the_rest_to_the_bottom(tmp_path):
    bottom, top = draw(read_runs([write_run(tmp_path / "r")]), LIGHT)["loss"].axes[0].get_ylim()
    assert 2.5 < bottom < 3.0 and 4 < top < 6, "the loss goes from 9 to 3, most of the way in the first steps"


def test_several_runs_have_names_colours_and_their_own_marks(tmp_path):
    runs = read_runs(
        [
            write_run(tmp_path / "ours"),
            write_run(tmp_path / "theirs", "full"),
            write_run(tmp_path / "alone", "lora", world_size=1),
        ]
    )
    figures = draw(runs, LIGHT)
    assert list(figures) == ["loss", "learning_rate", "throughput", "traffic", "comparison"]
    for figure in figures.values():
        assert legend(figure)[:3] == ["ours", "theirs", "alone"]
    marks = [line for line in figures["loss"].axes[0].lines if line.get_marker() == "|"]
    assert [list(line.get_xdata()) for line in marks] == [list(RESTARTS), [], []]
    assert marks[0].get_color() == LIGHT.runs[0]
    assert len({line.get_color() for line in figures["learning_rate"].axes[0].lines}) == 3
    tokens, sent = figures["comparison"].axes
    assert max(line.get_xdata()[-1] for line in tokens.lines if len(line.get_xdata())) == 200 * 64
    assert max(line.get_xdata()[-1] for line in sent.lines if len(line.get_xdata())) == 200_000
    assert len({line.get_color() for line in sent.lines}) == 2, "a run that sent nothing has no loss over bytes"


def test_bytes_are_drawn_against_full_rank(tmp_path):
    axes = draw(read_runs([write_run(tmp_path / "r")]), LIGHT)["traffic"].axes[0]
    ends = sorted(line.get_ydata()[-1] for line in axes.lines if len(line.get_xdata()) > 2)
    assert ends == [120_000, 200_000]
    assert [text.get_text() for text in axes.texts] == ["full rank: 1.67x"]


def test_a_run_of_one_step_can_be_drawn(tmp_path):
    runs = read_runs([write_run(tmp_path / "r", steps=1, world_size=1, state="running")])
    assert list(draw(runs, DARK)) == ["loss", "learning_rate", "throughput"]


def test_many_runs_repeat_colours_with_another_dash(tmp_path):
    runs = read_runs([write_run(tmp_path / f"run-{i}") for i in range(8)])
    looks = [
        (line.get_color(), line.get_linestyle())
        for line in draw(runs, LIGHT)["learning_rate"].axes[0].lines
        if line.get_marker() != "|"
    ]
    assert len(set(looks)) == 8


def test_smoothing_is_a_centred_mean_that_skips_nan():
    steps, values = np.arange(1.0, 101), np.zeros(100)
    values[49] = 5.0
    mean = smoothed(steps, values)
    assert np.flatnonzero(mean).tolist() == [47, 48, 49, 50, 51] and mean[49] == pytest.approx(1)
    values[49] = np.nan
    assert not smoothed(steps, values).any()
    assert np.isnan(smoothed(steps, np.full(100, np.nan))).all()
    short = np.array([3.0, 1.0])
    assert smoothed(short, short) is short


def test_limits_of_nothing_are_left_to_matplotlib():
    assert limits([(np.array([1.0, 2.0]), np.array([np.nan, np.nan]))]) is None
    assert limits([(np.array([1.0]), np.array([2.0]))]) is None


class Page(HTMLParser):
    """Collects tags and text, and notes what is not closed in order."""

    VOID = {"meta", "source", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    runs = [write_run(tmp_path / "ours <i>"), write_run(tmp_path / "broken", state="failed", reason="a & b < c")]
    page, *images = plot_runs(read_runs(runs), tmp_path / "out" / "deep")
    assert page == tmp_path / "out" / "deep" / "index.html"
    assert (
        {image.name for image in images}
        == {p.name for p in page.parent.glob("*.png")}
        == {"loss.png", "learning_rate.png", "throughput.png", "traffic.png", "comparison.png"}
    )
    assert all(image.read_bytes().startswith(PNG) for image in images)

    text = page.read_text()
    parsed = Page(text)
    sources = [a.get("src", a.get("srcset")) for tag, a in parsed.tags if tag in ("img", "source")]
    assert len(sources) == 10 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    for words in (
        "ours <i>",
        "relora ended well.",
        "failed: a & b < c",
        "validation loss",
        "600 / 1.20k",
        "a <b> & c",
        "120.00 kB",
        "200.00 kB",
    ):
        assert words in parsed.text, words
    assert "prefers-color-scheme: dark" in text


def test_figures_in_a_run_directory_are_a_part_of_the_run(tmp_path):
    """So that it can be overwritten with them; what else lies there is somebody's."""
    run = write_run(tmp_path / "r")
    plot_runs(read_runs([run]), run / "plots")
    assert run_contents.look(run).foreign == ()
    (run / "plots" / "mine.png").touch()
    assert run_contents.look(run).foreign == ("plots/mine.png",)
    run_contents.delete(run)
    assert [path.name for path in (run / "plots").iterdir()] == ["mine.png"]


def test_drawing_loads_neither_torch_nor_deepspeed():
    code = (
        "import sys, relora_ds.lab.figures.run_figures; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.strip() == "[]"

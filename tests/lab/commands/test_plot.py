"""`python -m relora_ds plot`."""

import sys

import pytest

from relora_ds.__main__ import main
from tests.lab.figures.runs import write_run


def test_it_draws_runs_into_a_folder(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra .[plot]")
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    assert main(["plot", *runs, "--out", str(tmp_path / "out")]) == 0
    *told, figures = capsys.readouterr().out.splitlines()
    assert [line for line in told if not line.startswith("  ")] == [
        f"{name}: relora, 200 steps, 12.80k tokens, done" for name in ("a", "b")
    ]
    assert figures.startswith(f"figures in {tmp_path / 'out'}: loss.png, ") and "index.html" in figures
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_it_draws_what_a_real_run_left(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra .[plot]")
    from tests.training.runs import run

    run(tmp_path / "r", "train.steps=22", "eval.samples=1")
    assert main(["plot", str(tmp_path / "r"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "index.html").read_text()
    assert "after 22 steps" in text and "What the networks write" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "index.html",
        "loss.png",
        "learning_rate.png",
        "throughput.png",
        "traffic.png",
    }


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra .[plot]")
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: no run; it has no metrics.jsonl\n"
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_says_what_the_run_learned_and_what_to_install(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("relora_ds.lab.figures")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(write_run(tmp_path / "r"))]) == 1
    told = capsys.readouterr()
    assert "pip install '.[plot]'" in told.err and "The perplexity went from" in told.out

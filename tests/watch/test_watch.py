"""`relora watch`: what it reads of runs that train, and what it shows."""

import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from relora_ds.__main__ import main
from relora_ds.watch import chart, screen
from relora_ds.watch.followed_run import FollowedRun
from relora_ds.watch.progress import duration, progress_of
from tests.watch.runs import BEGAN, STEP_S, lines_until, write_run


def followed(directory, name="a run") -> FollowedRun:
    run = FollowedRun(directory, name)
    run.look()
    return run


def shown(*runs, width=130, height=40, now=BEGAN + STEP_S * 500 + 1) -> str:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(screen.screen(runs, width, height, now))
    return console.file.getvalue()


# -- reading -----------------------------------------------------------------------------------------------------------


def test_what_is_new_is_read_and_a_line_that_is_being_written_waits(tmp_path):
    run = followed(write_run(tmp_path, 100))
    assert len(run.lines["train"]) == 10
    file = tmp_path / "metrics.jsonl"
    line = json.dumps({**lines_until(110)[-1]})
    with file.open("a") as metrics:
        metrics.write(line[:20])
    run.look()
    assert len(run.lines["train"]) == 10
    with file.open("a") as metrics:
        metrics.write(line[20:] + "\nno json\n[]\n" + '{"kind": "train"}\n')
    run.look()
    assert [entry["step"] for entry in run.lines["train"]] == list(range(10, 111, 10))


@pytest.mark.parametrize(
    "value",
    ["many", [1], {"a": 1}, True, None, float("nan"), float("inf"), 10**400],
    ids=lambda value: str(value)[:9],
)
def test_what_is_no_number_is_left_out(tmp_path, value):
    write_run(tmp_path, 300)
    names = {name for line in lines_until(300) for name in line} - {"kind", "step", "phase"}
    names |= {"bytes", "write_s", "sync_s", "islands", "missing"}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for kind in ("train", "eval", "restart", "checkpoint", "sync", "spike", "phase"):
            file.write(json.dumps({"kind": kind, "step": 305, **dict.fromkeys(names, value)}) + "\n")
    text = shown(followed(tmp_path), now=BEGAN + STEP_S * 300 + 1)
    assert "305 of 1,000" in text and "500" in text
    (tmp_path / "status.json").write_text(json.dumps(dict.fromkeys(["state", "step", "reason", "time"], value)))
    assert "305 of 1,000" in shown(followed(tmp_path))


@pytest.mark.parametrize("how", ["replaced", "shortened", "gone"])
def test_lines_that_a_resume_drops_are_forgotten(tmp_path, how):
    run, file = followed(write_run(tmp_path, 200)), tmp_path / "metrics.jsonl"
    kept = "".join(json.dumps(line) + "\n" for line in lines_until(100))
    if how == "shortened":
        file.write_text(kept)
    else:
        file.unlink()
    if how == "replaced":
        (tmp_path / "new").write_text(kept + kept)  # longer than what was read
        (tmp_path / "new").rename(file)
    run.look()
    steps = [entry["step"] for entry in run.lines["train"]]
    assert steps == {"replaced": 2, "shortened": 1, "gone": 0}[how] * list(range(10, 101, 10))


def test_a_run_that_has_not_begun_and_one_that_cannot_be_read(tmp_path, caplog):
    run = followed(tmp_path)
    assert progress_of(run).state == "not begun" and "not begun" in shown(run)
    (tmp_path / "recipe.yaml").write_text("no: recipe\n")
    (tmp_path / "status.json").write_text("{")
    (tmp_path / "metrics.jsonl").mkdir()
    run.look()
    assert "status.json cannot be read" in caplog.text and "metrics.jsonl cannot be read" in caplog.text


def test_a_recipe_that_a_resume_changes_or_that_is_damaged(tmp_path):
    run = followed(write_run(tmp_path, 200, total=1000))
    assert progress_of(run).total_steps == 1000
    for recipe, total in (("train: {steps: 3000}\n", 3000), ("method: [", None), ("", None), ("\xff", None)):
        (tmp_path / "new").write_bytes(recipe.encode("latin-1"))
        (tmp_path / "new").rename(tmp_path / "recipe.yaml")
        run.look()
        assert progress_of(run).total_steps == total and "200" in shown(run)


# -- what it says of a run ---------------------------------------------------------------------------------------------


def test_how_far_how_fast_and_how_well(tmp_path):
    p = progress_of(followed(write_run(tmp_path, 500)), now=BEGAN + STEP_S * 500 + 1)
    assert (p.state, p.step, p.total_steps, p.restarts) == ("running", 500, 1000, 5)
    assert p.loss == pytest.approx(sum(3 + 100 / step for step in range(10, 501, 10)) / 50)
    assert (p.val_loss, p.tokens_per_s, p.silent_s) == (3 + 120 / 500, 500.0, 1.0)
    assert p.left_s == pytest.approx(500 * STEP_S)
    assert (p.sent, p.full_rank) == (5e8, 1.5e9)


def test_a_night_without_the_run_does_not_slow_it_down(tmp_path):
    run = followed(write_run(tmp_path, 500))
    for line in run.lines["train"][:-10]:
        line["time"] -= 8 * 3600
    assert progress_of(run, BEGAN + STEP_S * 500).left_s == pytest.approx(500 * STEP_S)


def test_a_run_that_is_silent_and_one_whose_process_is_gone(tmp_path):
    run = followed(write_run(tmp_path, 500))
    logged = BEGAN + STEP_S * 500
    assert progress_of(run, logged + 199).state == "running"
    silent = progress_of(run, logged + 201)  # ten intervals of 20 s
    assert (silent.state, silent.why) == ("silent", "nothing was logged for 3 min")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lock = tmp_path / "lock"
    lock.write_text(lock.read_text().replace(lock.read_text().split()[1], f"{ended.pid}"))
    dead = progress_of(run, logged + 1)
    assert dead.state == "dead" and dead.left_s is None
    assert dead.why == f"process {ended.pid}, which trained it, is gone; resume=auto continues it"
    lock.write_text(f"process {ended.pid} on another-machine\n")
    assert progress_of(run, logged + 1).state == "running"


def test_the_reason_of_a_run_that_has_failed(tmp_path):
    run = followed(write_run(tmp_path, 500, state="failed", reason="a guard ended it"))
    p = progress_of(run, BEGAN + 1e6)
    assert (p.state, p.why, p.left_s) == ("failed", "a guard ended it", None)
    assert "a run: a guard ended it" in shown(run)


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (300, "5 min"), (3725, "1 h 2 min"), (200_000, "2 d 7 h"), (59.4, "59 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# -- the screen --------------------------------------------------------------------------------------------------------


def test_one_run(tmp_path):
    text = shown(followed(write_run(tmp_path, 500)))
    head, row = text.splitlines()[:2]
    columns = "run state step left loss validation tokens/s restarts sent last line"
    assert head.split() == columns.split()
    assert "running  500 of 1,000, 50 %  17 min" in row and "500.00 MB (3.00x less)" in row and "1 s ago" in row
    assert "training loss" in text and "validation loss" in text
    assert text.splitlines()[-1].strip() == "step 500  restart, 0.5 s" and "step 500  validation loss 3.2400" in text


def test_a_narrow_terminal_leaves_columns_out_and_cuts_none(tmp_path):
    text = shown(followed(write_run(tmp_path, 500)), width=80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "validation" in text and "last line" not in text


def test_several_runs_are_compared(tmp_path):
    runs = [followed(write_run(tmp_path / name, steps), name) for name, steps in (("one", 500), ("other", 300))]
    text = shown(*runs)
    assert "training loss" not in text and "one: step 500  restart" in text
    legend = next(line for line in text.splitlines() if "one" in line and "other" in line)
    assert "⣿" in legend


def test_the_chart_begins_below_the_first_losses_and_marks_restarts(tmp_path):
    run = followed(write_run(tmp_path, 500))
    drawn = "\n".join(chart.chart([run], 100, 12))
    labels = [float(label) for label in re.findall(r"│ ([\d.]+)$", drawn, re.MULTILINE)]
    assert labels and max(labels) < 8, "the first loss is 13"
    assert drawn.count("│") > 3 * 12, "five restarts"
    assert chart.chart([followed(write_run(tmp_path / "new", 10))], 100, 12) == []
    assert len(chart.curve_of(run, 20)) <= 20


def test_without_uniplot_the_rest_is_shown(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uniplot", None)
    text = shown(followed(write_run(tmp_path, 500)))
    assert "pip install '.[watch]'" in text and "500 of 1,000" in text


# -- the command -------------------------------------------------------------------------------------------------------


def test_once_where_there_is_no_terminal(tmp_path, capsys):
    write_run(tmp_path / "a", 500, state="done")
    assert main(["watch", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done") == 1 and "\x1b" not in printed


def test_a_terminal_keeps_the_last_state_after_ctrl_c(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    directory, looks = write_run(tmp_path / "a", 400), []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        write_run(directory, 500)

    monkeypatch.setattr("relora_ds.commands.watch.time.sleep", sleep)
    assert main(["watch", str(directory), "--every", "5"]) == 0
    assert looks == [5.0] * 3 and "500 of 1,000" in capsys.readouterr().out


def test_what_is_wrong_is_named(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "none")]) == 1
    assert f"RUN: {tmp_path / 'none'} is no directory" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--every", "0"]) == 1
    assert "--every: 0 is not between 0.1 and 3600 seconds" in capsys.readouterr().err

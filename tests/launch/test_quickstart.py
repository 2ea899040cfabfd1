"""The end of quickstart.sh: a complete run is described and drawn, and the exit code is the run's."""

import shutil
import sys

import pytest

from tests.lab.figures.runs import write_run
from tests.launch.scripts import ROOT, SCRIPTS, run

# What the script sources, without an environment and a run: it is there already, or was not written.
SOURCED = """
say() {{ printf '%s\\n' "$*"; }}
prepare_environment() {{ PYTHON={python} && say "extras: $1"; }}
count_ranks() {{ ranks=2; }}
divide_machine() {{ :; }}
launch_here() {{ say "launched in $1" && return "$CODE"; }}
ROOT={checkout}
"""
TINY = [
    *("model.preset=tiny", "data.source=pydocs", "data.vocab_size=512", "data.seq_len=64", "log.every=1"),
    *("train.steps=6", "warm_start_steps=2", "optim.warmup_steps=1"),
    *("relora.r=4", "relora.restart_every=2", "relora.restart_warmup_steps=1", "relora.residual_every=2"),
]


@pytest.fixture
def quickstart(tmp_path):
    """`quickstart(exit code of the run, *arguments)`: the exit code and the lines of the script."""
    checkout = tmp_path / "checkout"
    scripts = checkout / "launch_scripts"
    scripts.mkdir(parents=True)
    (checkout / "relora_ds").symlink_to(ROOT / "relora_ds")
    shutil.copy(SCRIPTS / "quickstart.sh", scripts)
    (scripts / "environment.sh").write_text(SOURCED.format(python=sys.executable, checkout=checkout))
    (scripts / "launch.sh").touch()

    def call(code: int, *arguments: str) -> tuple[int, list[str]]:
        ended, printed = run("bash", scripts / "quickstart.sh", *arguments, cwd=tmp_path, CODE=str(code))
        return ended, printed.splitlines()

    return call


def test_a_complete_run_is_described_and_drawn(quickstart, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra .[plot]")
    write_run(tmp_path / "mine")
    code, (extras, launched, first, *lines) = quickstart(0, "run_dir=mine")
    assert (code, extras, launched) == (0, "extras: plot", "launched in mine")
    assert first == "mine: relora, 200 steps, 12.80k tokens, done"
    assert any("The perplexity went from" in line for line in lines)
    assert lines[-1].startswith("figures in mine/plots: loss.png, ")
    assert (tmp_path / "mine/plots/loss.png").is_file() and (tmp_path / "mine/plots/index.html").is_file()


@pytest.mark.parametrize("code", [1, 75])
def test_a_run_that_did_not_end_is_not_drawn(quickstart, tmp_path, code):
    write_run(tmp_path / "runs/quickstart")
    assert quickstart(code) == (code, ["extras: plot", "launched in runs/quickstart"])
    assert not (tmp_path / "runs/quickstart/plots").exists()


def test_a_run_that_cannot_be_drawn_is_complete(quickstart):
    code, lines = quickstart(0)
    assert code == 0
    assert lines[-2].startswith("error: ") and lines[-2].endswith("runs/quickstart: no run; it has no metrics.jsonl")
    assert lines[-1].startswith("the run is complete, and could not be drawn")


@pytest.mark.slow
def test_a_real_run_starts_afresh_and_replaces_its_figures(tmp_path):
    picture = tmp_path / "runs/quickstart/plots/loss.png"
    for _ in range(2):
        code, printed = run("bash", SCRIPTS / "quickstart.sh", *TINY, cwd=tmp_path)
        assert code == 0, printed
        *_, state, training, validation, trained, sample, figures = printed.splitlines()
        assert state.startswith("quickstart: galore, 6 steps, ") and state.endswith(" tokens, done")
        assert training.startswith("  The training loss went from ") and "bits per byte" in validation
        assert "trained after step 2. In these steps each rank sent " in trained and "It continues" in sample
        assert figures.startswith("figures in runs/quickstart/plots: loss.png, ")
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.write_bytes(b"\x89PNG older")  # the next run takes it for its own

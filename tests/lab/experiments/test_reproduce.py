"""`reproduce`: what has ended is not trained again, what was stopped goes on, and the tables say what was measured."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

from relora_ds.__main__ import main
from relora_ds.config import load_recipe
from relora_ds.lab.bench import environment
from relora_ds.lab.experiments import budget, suite_report
from relora_ds.lab.experiments.runner import Runner
from relora_ds.lab.experiments.runs import Results, Run, _spectrum, result_of
from relora_ds.lab.experiments.suites import read_suite
from relora_ds.training.exit_codes import Preempted
from relora_ds.training.metrics_log import read_metrics

SMALL = (
    "model.preset=tiny",
    "data.source=pydocs",
    "data.vocab_size=512",
    "data.seq_len=64",
    "data.max_tokens=4000",
    "train.steps=12",
    "train.batch_sequences=4",
    "train.micro_batch_size=4",
    "optim.warmup_steps=1",
    "eval.every=null",
    "log.every=1",
    "checkpoint.every=4",
    "checkpoint.keep_every=4",
)
TINY = load_recipe("tiny_relora")
TRANSITION, STEPS = TINY.warm_start_steps, TINY.total_steps
RESTARTS = [TRANSITION + TINY.relora.restart_every * i for i in (1, 2)]
RELORA = (
    "warm_start_steps=4",
    "relora.r=4",
    "relora.restart_every=3",
    "relora.restart_warmup_steps=1",
    "optim.warm_start_warmup_steps=1",
)


def runs_of(*names: str, seeds: int = 1, suite: str = "main") -> list[Run]:
    return [Run.of(row, seed) for seed in range(seeds) for row in read_suite(suite, "tiny").rows if row.name in names]


class Pretended(Runner):
    """Instead of training, a run directory as a finished (or failed) run leaves it."""

    def __init__(self, runs, failing=(), preempted=()):
        super().__init__(runs)
        self.failing, self.preempted, self.trained = failing, preempted, []

    def execute(self, run, directory, *more):
        assert "resume=auto" in more
        self.trained.append((run.row.name, run.seed))
        directory.mkdir(parents=True, exist_ok=True)
        state = "failed" if run.row.name in self.failing else "preempted" if run.row.name in self.preempted else "done"
        (directory / "status.json").write_text(json.dumps({"state": state, "reason": "the disk is full"}))
        if state == "done":
            leave_a_run(run, directory)
        return 0  # as the DeepSpeed launcher says of anything


def leave_a_run(run: Run, directory, loss: float = 3.0) -> None:
    tokens = run.tokens
    loss += len(run.row.name) / 10 + run.seed / 100
    (directory / "summary.json").write_text(
        json.dumps(
            {
                "method": run.recipe.method,
                "model": "llama_9m",
                "precision": "fp32",
                "world_size": 1,
                "val_loss": loss,
                "val_tokens": 1000,
                "data_fingerprint": "0123456789abcdef",
                "ppl": math.exp(loss),
                "tokens": tokens,
                "step": STEPS,
                "seconds": 36.0,
                "restarts": 2,
                "skipped_steps": 0,
                "trainable_parameters": 1_000_000,
                "total_parameters": 2_000_000,
                "bytes_wire": 0,
                "full_rank_bytes_wire": 0,
            }
        )
    )
    lines = [
        {
            "kind": "train",
            "step": step,
            "phase": "warm_start" if step <= TRANSITION else run.recipe.method,
            "tokens": tokens * step // STEPS,
            "loss": 5 - step / STEPS,
            "tokens_per_s": 100.0,
            **({"max_update_over_lr": step - RESTARTS[0]} if 0 < step - RESTARTS[0] <= 10 else {}),
        }
        for step in range(1, STEPS + 1)
    ]
    lines += [
        {"kind": "eval", "step": step, "phase": "x", "val_loss": 4.0 + step / STEPS, "val_tokens": tokens}
        for step, tokens in ((TRANSITION, 1000), (TRANSITION + 1, 100), (STEPS, 1000))
    ]
    lines += [{"kind": "restart", "step": step, "phase": "x", "merge_loss_total": 0.5} for step in RESTARTS]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_has_ended_is_not_trained_again(tmp_path):
    runs, results, said = runs_of("full rank", "ReLoRA", seeds=2), Results(tmp_path / "results"), []
    runner = Pretended(tmp_path / "runs", preempted=["ReLoRA"])
    with pytest.raises(Preempted):
        runner.train_all(runs, results, 1, said.append)
    assert runner.trained[:2] == [("full rank", 0), ("ReLoRA", 0)]
    assert results.read(runs[0])["val_loss"] == 3.9 and results.read(runs[1]) is None
    again = Pretended(tmp_path / "runs")
    assert again.train_all(runs, Results(tmp_path / "results"), 1, said.append) == []
    assert ("full rank", 0) not in again.trained and ("ReLoRA", 0) in again.trained
    assert all(results.read(run) for run in runs)
    Pretended(tmp_path / "elsewhere", failing=["full rank", "ReLoRA"]).train_all(runs, results, 2, said.append)


def test_a_failure_is_told_and_the_others_go_on(tmp_path):
    runs, results = runs_of("full rank", "Control", "ReLoRA"), Results(tmp_path / "results")
    failures = Pretended(tmp_path / "runs", failing=["Control"]).train_all(runs, results, 1, lambda _: None)
    assert len(failures) == 1 and "Control" in failures[0] and "the disk is full" in failures[0]
    assert [results.read(run) is not None for run in runs] == [True, False, True]


def test_a_failure_is_told_in_the_programs_own_words(tmp_path, monkeypatch):
    (run,) = runs_of("ReLoRA")
    runner = Runner(tmp_path / "runs")
    program = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(program))

    program.write_text("#!/bin/sh\nprintf 'error: 1 problem:\\n  data.source: none\\n[INFO] killed\\n'\nexit 2\n")
    program.chmod(0o755)
    with pytest.raises(ValueError, match="ReLoRA: a trial of .* failed: 1 problem:\n  data.source: none; see .*log$"):
        budget.trial(runner)(run)
    assert "1 problem:\n  data.source: none; see " in runner.train(run)

    program.write_text("#!/bin/sh\nexit 9\n")
    assert "exit code 9; see " in runner.train(run), "the error is an earlier attempt's"


def test_what_is_kept_of_a_run(tmp_path):
    (run,) = runs_of("ReLoRA")
    leave_a_run(run, tmp_path)
    kept = result_of(run, tmp_path, {"commit": "abc", "threads": 1})
    assert kept["loss_at_switch"] == 4 + TRANSITION / STEPS
    assert kept["curve"] == [[run.tokens * TRANSITION / STEPS, kept["loss_at_switch"]], [run.tokens, 5.0]]
    assert kept["first_updates"] == 10 and kept["restart_steps"] == RESTARTS
    assert kept["tokens_per_s"] == {"warm_start": 100, "relora": 100}
    assert len(kept["train_curve"]) == 100 and kept["train_curve"][-1][0] == run.tokens
    assert kept["train_curve"][0] == [run.tokens // 100, pytest.approx(5 - 50 / STEPS)]
    assert kept["conditions"] == {"commit": "abc"}
    assert json.loads(json.dumps(kept)) == kept


def test_the_commit_is_that_of_the_runs_start(tmp_path, monkeypatch):
    checked_out = ["first"]
    monkeypatch.setattr(environment, "commit_of", lambda package: checked_out[-1])

    class MovesOn(Pretended):
        def execute(self, run, directory, *more, **options):
            checked_out.append("second")
            return super().execute(run, directory, *more, **options)

    (run,), results = runs_of("full rank"), Results(tmp_path / "results")
    assert MovesOn(tmp_path / "runs").train_all([run], results, 1, lambda _: None) == []
    assert results.read(run)["conditions"]["commit"] == "first"


def test_the_table(tmp_path):
    suite, results = read_suite("main", "tiny"), Results(tmp_path / "results")
    runs = [Run.of(row, seed) for seed in range(3) for row in suite.rows]
    runner = Pretended(tmp_path / "runs", failing=["LoRA"])
    runner.train_all(runs, results, 1, lambda _: None)
    page, html, *figures = suite_report.write(suite, runs, results, runner.directory, with_figures=True)
    text = page.read_text()
    assert "15 of 18 runs have ended" in text
    full, relora = (
        next(line for line in text.splitlines() if line.startswith(f"| {name} |")) for name in ("full rank", "ReLoRA")
    )
    assert "3.9100 ± 0.0100" in full and "+0.3000 (+0.3000 to +0.3000)" in full and "33.81" in full
    assert "reference" in relora and f"{4 + TRANSITION / STEPS:.3f}" in relora and "| LoRA |" not in text
    assert [figure.name for figure in figures] == ["main_loss.png", "main_differences.png"]
    assert all(figure.stat().st_size > 10_000 for figure in figures)
    assert "<td>3.9100 ± 0.0100</td>" in html.read_text() and html.read_text().count("data:image/png") == 4


def test_a_sweep_names_its_best_value_and_whether_it_is_an_edge(tmp_path):
    suite, results = read_suite("lr", "tiny"), Results(tmp_path)
    runs = [Run.of(row, 0) for row in suite.rows]
    for run in runs:
        loss = abs(math.log(run.row.value / (0.004 if run.row.group == "ReLoRA" else 0.1)))
        results.write(
            run,
            {
                "name": run.name,
                "seed": 0,
                "val_loss": loss,
                "val_tokens": 1,
                "ppl": 1,
                "seconds": 1,
                "restarts": 0,
                "bytes_wire": 0,
                "trainable_parameters": 1,
                "total_parameters": 1,
                "tokens": 1,
                "r": 8,
                "conditions": {},
                "train_curve": [],
                "curve": [],
            },
        )
    rows = suite_report.measured(suite, runs, results)
    text = suite_report.markdown(suite, suite_report.blocks(suite, rows, len(runs)))
    assert "ReLoRA 0.004 (0.0000)" in text and "full rank 0.008 (2.5257, the edge of what was tried)" in text
    assert (
        set(suite_report.sweeps(rows)) == {"learning rate"}
        and len(suite_report.sweeps(rows)["learning rate"]["ReLoRA"]) == 4
    )
    _, _, *figures = suite_report.write(suite, runs, results, lambda run: tmp_path / run.name, True)
    assert [figure.name for figure in figures] == ["lr_learning_rate.png"]


def test_the_hours_of_a_run_that_rows_share_count_once():
    rows = [
        suite_report.Measured(row, [{"name": Run.of(row, 0).name, "seconds": 3600, "conditions": {}}])
        for row in read_suite("horizon", "tiny").rows
    ]
    assert len(rows) == 22 and suite_report._made(rows).endswith(". 20.0 hours of training.")


def test_conditions_are_said_once_with_all_of_their_commits():
    row, commits = read_suite("main", "tiny").rows[0], ("0123456789ab", "fedcba9876543-dirty", "0123456789ab")
    results = [
        {"name": str(i), "seconds": 60, "conditions": {"torch": "2", "commit": commit}}
        for i, commit in enumerate(commits)
    ]
    told = suite_report._made([suite_report.Measured(row, results)])
    assert told == "torch 2, commit 0123456789 fedcba9876-dirty. 0.1 hours of training."


def test_losses_on_other_texts_are_told_apart():
    def told(*texts: tuple[int, str | None]) -> list[str]:
        return suite_report.remarks_on_texts(
            [
                suite_report.Measured(row, [{"val_tokens": tokens, **({"data_fingerprint": text} if text else {})}])
                for row, (tokens, text) in zip(read_suite("main", "tiny").rows, texts, strict=False)
            ]
        )

    assert told((1000, "a" * 64), (1000, "a" * 64), (1000, None)) == []
    assert told((1000, None), (1000, None)) == []
    [remark] = told((1000, "a" * 64), (1000, "b" * 64), (1000, "b" * 64))
    assert "full rank: 1,000 validation tokens, fingerprint aaaaaaaaaa; Control, LoRA: 1,000 validation" in remark
    [remark] = told((1000, None), (1001, None))
    assert remark.endswith("full rank: 1,000 validation tokens; Control: 1,001 validation tokens.")


def test_more_tokens_are_not_a_better_setting():
    rows = [
        suite_report.Measured(row, [{"seed": 0, "val_loss": 3.0, "tokens": row.value}])
        for row in read_suite("horizon", "tiny").rows
    ]
    assert suite_report._best(rows) == []


def test_the_budget(tmp_path):
    runs, results, asked = runs_of("full rank", "LoRA", "ReLoRA", seeds=3), Results(tmp_path / "results"), []
    Pretended(tmp_path / "runs").train_all(runs_of("full rank"), results, 1, lambda _: None)

    def measure(run):
        asked.append(run.row.name)
        return 1000.0

    lines = budget.budget(runs, results, measure)
    assert asked == ["LoRA", "ReLoRA"]  # a finished run tells full rank's speed
    tokens = TINY.total_steps * TINY.tokens_per_step
    full, lora, _ = lines
    assert (full.runs, full.finished, full.tokens, full.tokens_left) == (3, 1, 3 * tokens, 2 * tokens)
    assert full.tokens_per_s == tokens / 36 and full.hours == pytest.approx(2 * 36 / 3600)
    assert lora.hours == pytest.approx(3 * tokens / 1000 / 3600)
    assert budget.budget(runs, results, None)[1].hours is None


def test_dry_run_of_the_papers_scale(capsys, tmp_path):
    assert main(["reproduce", "main", "ablation", "--scale", "paper", "--dry-run", "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "7.80B" in text and "unknown before a trial" in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "SUITE: nothing is none"),
        (["train.steps=3"], "SUITE: none was given"),
        (["main", "--seeds", "0"], "--seeds: 0 is not 1 or more"),
        (["main", "--jobs", "-1"], "--jobs: -1"),
        (["main", "--rows", "GaLore"], "--rows: 'GaLore' is no row of main; there are 'Control'"),
        (["main", "relora.rank=3"], "relora.rank"),
    ],
)
def test_bad_input(words, message, capsys, tmp_path):
    assert main(["reproduce", *words, "--dry-run", "--runs", str(tmp_path)]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_one_real_run_is_measured_trained_and_kept(capsys, tmp_path):
    words = [
        "reproduce",
        "main",
        "--rows",
        "ReLoRA",
        "--seeds",
        "1",
        "--threads",
        "1",
        "--runs",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "kept"),
        *SMALL,
        *RELORA,
    ]
    assert main(words) == 0, capsys.readouterr()
    found = json.loads(next((tmp_path / "kept").glob("relora-*-seed0.json")).read_text())
    assert found["restarts"] == 2 and found["tokens"] == 12 * 4 * 64 and found["first_updates"] > 0
    assert set(found["tokens_per_s"]) == {"warm_start", "relora"}
    assert found["spectrum"]["start"] == 4 and 4 < found["spectrum"]["numerical_rank"] <= 12
    assert _spectrum(tmp_path / "runs" / found["name"], transition=5) is None, "full-rank steps would be in it"
    written = {path.name for path in (tmp_path / "kept").iterdir()}
    assert {"main.md", "main.html", "main_loss.png", "main_singular_values.png"} <= written
    text = capsys.readouterr().out
    assert "1 runs: " in text and "?" not in text.splitlines()[1]


@pytest.mark.slow
def test_a_stopped_suite_goes_on_where_it_was(tmp_path):
    command = [
        sys.executable,
        "-m",
        "relora_ds",
        "reproduce",
        "main",
        "--rows",
        "full rank",
        "--seeds",
        "1",
        "--runs",
        str(tmp_path),
        *SMALL,
        "train.steps=400",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    run_dir = wait_for(lambda: next(tmp_path.glob("full-*-seed0"), None))
    wait_for(
        lambda: (run_dir / "metrics.jsonl").is_file() and any(line["step"] >= 20 for line in read_metrics(run_dir))
    )
    process.send_signal(signal.SIGTERM)
    assert "the same command resumes" in process.communicate(timeout=60)[1] and process.returncode == 75
    saved = json.loads((run_dir / "status.json").read_text())
    assert saved["state"] == "preempted" and 20 <= saved["step"] < 400
    assert subprocess.run(command, check=False).returncode == 0
    assert f"step {saved['step']}" in (run_dir.with_name(f"{run_dir.name}.log")).read_text()
    steps = [line["step"] for line in read_metrics(run_dir) if line["kind"] == "train"]
    assert steps == list(range(1, 401))


def wait_for(found, seconds: float = 120):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError("it did not happen")

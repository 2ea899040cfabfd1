"""The check of a GPU runs from beginning to end, keeps what it has, and goes on after what fails."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relora_ds.lab.bench import gpu_check, gpu_report
from relora_ds.lab.bench.watched import Process
from relora_ds.models.flops import PEAK_FLOPS, peak_flops

ROOT = Path(__file__).parents[3]
# In the place of relora_ds.lab.bench.gpu_jobs: a job's name is what it does.
JOBS = """
import json, os, sys, time
jobs, lines = json.load(open(sys.argv[-2])), sys.argv[-1]
for name, arguments in jobs:
    if name == "dies":
        print("it dies"), sys.stdout.flush(), os.kill(os.getpid(), 11)
    if name == "hangs":
        time.sleep(60)
    found = {"error": "it fails"} if name == "fails" else {"result": {"pid": os.getpid()}}
    open(lines, "a").write(json.dumps(found) + "\\n")
    if name == "fails":
        sys.exit(1)
"""


def check(seconds: float = 60, out: Path | None = None) -> gpu_check.Check:
    return gpu_check.Check(gpu_check.TINY, seconds, out)


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.setattr(gpu_check, "_on_ranks", lambda n, module, listed: [sys.executable, "-c", JOBS, listed])


def test_after_a_job_that_fails_or_dies_the_next_ones_are_done_in_another_process(jobs):
    one, fails, two, dies, three, four = check()._jobs(
        [[name, {}] for name in ("works", "fails", "works", "dies", "works", "works")], 1, 60
    )
    assert fails == {"error": "it fails"} and dies["error"] == "exit code -11: it dies"
    pids = [found["result"]["pid"] for found in (one, two, three, four)]
    assert len(set(pids)) == 3 and pids[2] == pids[3]


def test_when_the_time_is_up_the_rest_is_said_to_be_left_out(jobs):
    started = time.monotonic()
    first, *others = check()._jobs([["works", {}], ["hangs", {}], ["works", {}]], 1, 2)
    assert "result" in first and others == [{"skipped": gpu_check.OUT_OF_TIME}] * 2
    assert time.monotonic() - started < 20


def test_a_process_ends_with_its_children_and_its_lines_are_read_while_it_runs(tmp_path):
    code = (
        "import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '300']); "
        "open(os.environ['LINES'], 'w').write('{\"child\": %d}\\n{\"half\"' % child.pid); time.sleep(300)"
    )
    lines = Process([sys.executable, "-c", code], "LINES").lines(60)
    child = next(lines)["child"]
    os.kill(child, 0)
    lines.close()
    time.sleep(0.2)
    state = Path(f"/proc/{child}/stat")
    assert not state.is_file() or state.read_text().split()[2] == "Z"


def test_a_check_that_is_killed_leaves_what_it_has(tmp_path, monkeypatch, jobs):
    monkeypatch.setattr(gpu_check.Check, "_correctness", lambda self: iter([{"name": "one", "outcome": "passed"}]))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check.Check, "_speeds", killed)
    with pytest.raises(KeyboardInterrupt):
        check(out=tmp_path / "found.json").run()
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["bench"] == "gpu-check" and record["result"]["parts"]["correctness"][0]["outcome"] == "passed"


def test_sigterm_ends_the_job_as_well(tmp_path, monkeypatch):
    ended = []

    def job(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            ended.append("job")

    monkeypatch.setattr(gpu_check.Check, "run", job)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.run(argparse.Namespace(minutes=1, tiny=True, out=tmp_path / "found.json"))
    assert stopped.value.code == 143 and ended == ["job"] and signal.getsignal(signal.SIGTERM) == before


def test_what_is_not_installed_is_said_and_not_measured(jobs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one = check()
    one._until = 60
    found = {entry["name"]: entry for entry in one._speeds("speed at 350M", gpu_check.ORDER)}
    assert found["PEFT, its default"]["skipped"] == "peft is missing; pip install peft"
    assert found["ours, nf4"]["skipped"].startswith("nf4 needs bitsandbytes")
    assert "pid" in found["ours, dense"]


def test_the_most_of_a_card():
    assert peak_flops("NVIDIA H100 80GB HBM3") == PEAK_FLOPS["H100"] > peak_flops("NVIDIA H100 PCIe")
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    for other in ("Tesla T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", ""):
        assert peak_flops(other) is None


def speed(name: str, tokens_per_s: float, **more) -> dict:
    return {
        "name": name,
        "preset": "llama_350m",
        "stage": 1,
        "world_size": 1,
        "micro_batch_size": 8,
        "tokens_per_s": tokens_per_s,
        "mfu": 0.4,
        "peak_bytes": 8e9,
        **more,
    }


CONDITIONS = {"device": "NVIDIA H200", "cores": 16, "threads": 1, "torch": "2.13.0"}
RECORD = {
    "bench": "gpu-check",
    "conditions": CONDITIONS,
    "result": {
        "tiny": False,
        "minutes": 12,
        "missing": {"liger-kernel": "its kernels"},
        "machine": {
            "conditions": CONDITIONS,
            "gpus": 1,
            "memory_bytes": 150e9,
            "cuda": "13.0",
            "measured_flops": 700e12,
        },
        "parts": {
            "correctness": [
                {"name": "a", "outcome": "passed"},
                {"name": "b", "outcome": "failed", "error": "assert 1\nE  1 is not 2"},
            ],
            "speed at 350M": [
                speed("full rank", 1e5),
                speed("ours, dense", 1.5e5),
                {"name": "ours, nf4", "preset": "llama_350m", "stage": 3, "error": "out of memory"},
                {"name": "x", "skipped": "the time was up"},
            ],
            "restart": [
                {
                    "name": "restart: ours, dense",
                    "preset": "llama_350m",
                    "stage": 1,
                    "world_size": 1,
                    "pauses_s": [0.5, 0.4, 0.6],
                    "without_drift_s": [0.3, 0.2, 0.4],
                    "step_s": 2.0,
                },
                {"name": "restart: ours, nf4", "preset": "llama_1b", "stage": 1, "skipped": "the time was up"},
            ],
            "layer": [{"name": "one layer", "error": "RuntimeError: self must be row_major"}],
        },
    },
}


def test_the_tables():
    text = gpu_report.markdown(RECORD["result"])
    assert "| ours, dense | llama_350m | 1 | 1 | 8 | 150,000 | 1.50x | 40 % | 8.00 GB |" in text
    assert "| ours, dense | llama_350m | 1 | 1 | 0.500 s | 0.300 s | 2.000 s | 0.25 |" in text
    assert "- correctness: b: E  1 is not 2" in text and "- speed at 350M: x: the time was up" in text
    assert "- speed at 350M: ours, nf4 (llama_350m, ZeRO-3): out of memory" in text
    assert "- restart: ours, nf4 (llama_1b, ZeRO-1): the time was up" in text
    assert "- its kernels: liger-kernel is not installed" in text
    assert gpu_report.suspicious(RECORD["result"]) == [
        "correctness: b: E  1 is not 2",
        "layer: one layer: RuntimeError: self must be row_major",
    ]
    assert gpu_check.exit_code(RECORD["result"]) == 1


def test_one_line_for_each_card():
    assert gpu_report.cards({}) == "No card was checked yet."
    line = gpu_report.cards({"h200": RECORD}).splitlines()[2]
    assert line == "| NVIDIA H200 | 1 | 1 | 1 | 100,000 (40 %) | 150,000 (40 %) | 1.50x |  |  |  |"


def test_without_a_gpu_it_says_how_to_try(capsys):
    from relora_ds.__main__ import main

    assert main(["bench", "gpu-check"]) == 1
    assert "--tiny runs all of it on the CPU" in capsys.readouterr().err
    assert main(["bench", "gpu-check", "--tiny", "--minutes", "0"]) == 1
    assert "--minutes: 0 is no time" in capsys.readouterr().err


@pytest.mark.slow
def test_all_of_it_runs(tmp_path):
    out = tmp_path / "found.json"
    done = subprocess.run(
        ["bash", "launch_scripts/gpu_check.sh", str(out), "--tiny", "--minutes", "120"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())["result"]
    assert not gpu_report.suspicious(result)
    measured = {
        part: [entry["name"] for entry in entries if "skipped" not in entry]
        for part, entries in result["parts"].items()
    }
    for part in gpu_check.TINY.presets:
        assert sorted(measured[part]) == sorted(gpu_check.ORDER)
    assert len(measured["several GPUs"]) == 6 and len(measured["restart"]) == 6 and measured["layer"]
    assert len(result["parts"]["correctness"]) > 80  # skipped where there is no GPU

"""start_ranks.py: the variables of the ranks, and how they end together."""

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.launch.scripts import ROOT, SCRIPTS, run, start

START = [sys.executable, SCRIPTS / "start_ranks.py", "--master_port", "29999"]
NAMES = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"]
SAVES = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(75)))"


def script(directory: Path, text: str) -> Path:
    path = directory / "script.py"
    path.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{text}\n")
    return path


def test_every_rank_knows_its_place(tmp_path):
    tell = script(
        tmp_path,
        f"""
import json
with open(f'{{sys.argv[1]}}/{{rank}}', 'w') as file:
    json.dump([os.environ[name] for name in {NAMES}] + sys.argv[2:], file)""",
    )
    code, printed = run(
        *START,
        "--ranks",
        2,
        "--first",
        3,
        "--world_size",
        6,
        "--master_addr",
        "gpu07",
        tell,
        tmp_path,
        "--config",
        "tiny",
    )
    assert code == 0, printed
    assert [json.loads((tmp_path / name).read_text()) for name in ("3", "4")] == [
        [rank, local, "6", "2", "2", "gpu07", "29999", "--config", "tiny"] for rank, local in (("3", "0"), ("4", "1"))
    ]


def test_the_exit_code_is_that_of_the_rank_that_fails_and_the_others_may_still_speak(tmp_path):
    fails = script(tmp_path, "if rank == 1: sys.exit(3)\ntime.sleep(2)\nprint('I know why')\ntime.sleep(300)")
    started = time.monotonic()
    code, printed = run(*START, "--ranks", 2, fails)
    assert code == 3 and "I know why" in printed and time.monotonic() - started < 60


def test_a_rank_that_is_killed(tmp_path):
    assert run(*START, "--ranks", 1, script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"))[0] == 137


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["to all", "to it alone"])
def test_after_a_signal_the_ranks_end_on_their_own(send, tmp_path):
    """launch.sh sends it to the whole process group, an operator perhaps to this process alone."""
    saves = script(tmp_path, f"{SAVES}\nos.write(1, b'ready\\n')\ntime.sleep(300)")
    process = start(*START, "--ranks", 2, saves)
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        send(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    finally:
        process.stdout.close()
        process.kill()


def test_the_time_that_ranks_have_to_save_can_be_set(tmp_path):
    saves = script(tmp_path, f"{SAVES.replace('(1)', '(rank * 60)')}\nos.write(1, b'ready\\n')\ntime.sleep(300)")
    process = start(*START, "--ranks", 2, saves, GRACE_SECONDS="2")
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(timeout=60) == 75 and 1 < time.monotonic() - started < 25
    finally:
        process.stdout.close()
        process.kill()


def test_the_launch_scripts_wait_for_the_ranks_of_one_that_was_killed(tmp_path):
    orphan = script(
        tmp_path,
        """
parent = os.getppid()  # before the test is told, which ends it
print('ready', parent)
while os.getppid() == parent: time.sleep(0.1)
time.sleep(2)
print('saved')""",
    )
    launch = f"set -eu; ROOT={ROOT}; PYTHON={sys.executable}; ranks=1; . {SCRIPTS}/launch.sh; launch_here none {orphan}"
    process = start("bash", "-c", launch)
    try:
        os.kill(int(process.stdout.readline().split()[1]), signal.SIGKILL)
        assert process.wait(timeout=60) == 137
        os.set_blocking(process.stdout.fileno(), False)
        assert "saved" in process.stdout.read()
    finally:
        process.stdout.close()
        process.kill()


def test_the_ranks_are_asked_to_end_where_the_launch_script_was_killed(tmp_path):
    saves = script(tmp_path, f"{SAVES}\nos.write(1, b'ready\\n')\ntime.sleep(40)")
    process = start("bash", "-c", f"{shlex.join(map(str, [*START, '--ranks', 1, saves]))} & wait")
    try:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        started = time.monotonic()
        assert process.stdout.read() == "" and time.monotonic() - started < 20  # its end comes with that of the ranks
    finally:
        process.stdout.close()


def test_no_ranks_are_refused(tmp_path):
    code, printed = run(*START, "--ranks", 0, script(tmp_path, ""))
    assert code == 2 and "--ranks: 0 is not a number of ranks; use 1 or more" in printed


def test_the_ranks_notice_that_it_was_killed(tmp_path):
    looks = script(
        tmp_path,
        """
from relora_ds.training.hooks.preemption import _launcher
parent = os.getppid()
print(_launcher() == parent)
while os.getppid() == parent: time.sleep(0.1)
print(_launcher())""",
    )
    process = start(*START, "--ranks", 1, looks, PYTHONPATH=str(ROOT), DS_ACCELERATOR="cpu")
    try:
        assert process.stdout.readline() == "True\n"
        process.kill()
        assert process.stdout.readline() == "None\n"
    finally:
        process.stdout.close()
        process.kill()

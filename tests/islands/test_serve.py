"""`relora islands serve`."""

import os
import re
import signal
import subprocess
import sys

import pytest

from relora_ds.__main__ import main
from relora_ds.islands.secret import VARIABLE
from tests.islands.servers import SECRET, joined


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal(tmp_path, number):
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    options = ["--listen", "127.0.0.1:0", "--secret-file", str(tmp_path / "secret")]
    process = subprocess.Popen(
        [sys.executable, "-m", "relora_ds", "islands", "serve", str(tmp_path / "rounds"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: value for name, value in os.environ.items() if name != VARIABLE},
    )
    try:
        first = process.stdout.readline()
        (address,) = re.findall(r"listening on (tcp://127\.0\.0\.1:\d+), 0 rounds decided", first)
        with joined(address, "a", count=1) as (a,):
            a.contribute(1, {"w": b"1234"}, {}, 1)
            assert [*a.decision(1).islands] == ["a"]
    finally:
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    lines = [line[len("2000-01-01 00:00:00 ") :] for line in said.splitlines()]
    assert process.returncode == 0 and lines == [
        "island a: joined with 1 rank, has applied round 0 of 0",
        "round 1: island a is complete, 4 B",
        "round 1: decided with a",
        "stopped",
    ]
    assert SECRET not in first + said


def test_it_needs_no_torch(tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, numpy=None, transformers=None, deepspeed=None)\n"
        "from relora_ds.__main__ import main; import relora_ds.islands.server, relora_ds.islands.client\n"
        f"sys.exit(main(['islands', 'serve', {str(tmp_path / 'a')!r}, '--listen', 'nowhere']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, VARIABLE: SECRET}, capture_output=True, text=True, check=False
    )
    assert done.stderr == "error: --listen: 'nowhere' is not HOST:PORT; use e.g. tcp://0.0.0.0:5555\n"
    assert done.returncode == 1 and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeout", "0"], "--timeout: 0 s is no time to wait; use e.g. 600"),
        (["--keep-rounds", "0"], "--keep-rounds: 0 would keep no round; give at least 1"),
        ([], f"{VARIABLE} holds no secret; put the same one there for the server and every island"),
        (["--secret-file", "/nowhere"], "/nowhere"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["islands", "serve", str(tmp_path / "a"), *options]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_pyzmq_comes_with_an_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("relora_ds.islands.requirement.find_spec", lambda name: None)
    assert main(["islands", "serve", str(tmp_path / "a")]) == 1
    assert "islands: they need pyzmq, which is not installed; pip install '.[islands]'" in capsys.readouterr().err

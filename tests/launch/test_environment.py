"""launch_scripts/environment.sh takes PyTorch's CPU build where there is no GPU, unless the user has set pip up."""

import http.server
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.launch.scripts import SCRIPTS, run

PAGE = b'<a href="torch-2.99.0+cpu-py3-none-any.whl">torch-2.99.0+cpu-py3-none-any.whl</a>'
CHOOSE = (
    'source launch_scripts/environment.sh; CPU_INDEX=$INDEX PYTHON=$TESTED; choose_build; echo "options: ${build[*]}"'
)


@pytest.fixture
def index():
    """An index with a CPU build of torch: `(its URL, the paths that were asked for)`."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PAGE)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout whose `.venv/bin/python` writes down what pip is asked to install, on an x86_64 without a GPU."""
    for name in ("launch_scripts", "tools", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(SCRIPTS / "environment.sh", tmp_path / "launch_scripts")
    (tmp_path / "pyproject.toml").write_text("")
    program(tmp_path / "tools/uname", "echo Linux x86_64")
    program(
        tmp_path / ".venv/bin/python",
        'case "$*" in\n"-m pip install"*) echo "$*" >>installed ;;\n'
        '"-m pip list"* | "-m pip freeze"*) cat has 2>/dev/null ;;\n'
        f'*) exec "{sys.executable}" "$@" ;; esac',
    )
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def plain(checkout: Path, **more: str) -> dict[str, str]:
    """An environment without settings of pip and without nvidia-smi: only the folders that hold needed programs."""
    kept = [name for name in os.environ["PATH"].split(":") if not (Path(name) / "nvidia-smi").exists()]
    pip = {name: "" for name in os.environ if name.startswith("PIP_")}
    return {**pip, "PIP_CONFIG_FILE": "/dev/null", "PATH": f"{checkout / 'tools'}:{':'.join(kept)}", **more}


def choose(checkout: Path, url: str, **more: str) -> str:
    variables = plain(checkout, INDEX=url, TESTED=sys.executable, **more)
    return run("env", *(f"{k}={v}" for k, v in variables.items()), "bash", "-c", CHOOSE, cwd=checkout)[1]


def test_without_a_gpu_the_cpu_build_is_taken_and_announced(checkout, index):
    printed = choose(checkout, index[0])
    assert f"options: --extra-index-url {index[0]}\n" in printed
    assert "no NVIDIA GPU was found: PyTorch's CPU build" in printed and "0.2 GB instead of 3 to 6" in printed
    assert index[1] == ["/torch/"]


@pytest.mark.parametrize(
    "setting",
    [
        {"PIP_CONSTRAINT": "/dev/null"},
        {"PIP_INDEX_URL": "https://pypi.org/simple"},
        {"PIP_EXTRA_INDEX_URL": "https://example.org/simple"},
        {"PIP_FIND_LINKS": "/nowhere"},
        {"PIP_NO_INDEX": "1"},
        {"PIP_CONFIG_FILE": "pip.conf"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_the_user_win(checkout, index, setting):
    (checkout / "pip.conf").write_text("[global]\nindex-url = https://example.org/simple\n")
    printed = choose(checkout, index[0], **setting)
    assert "options: \n" in printed and "pip's settings decide" in printed
    assert index[1] == []


def test_a_gpu_gets_the_build_with_cuda(checkout, index):
    program(checkout / "tools/nvidia-smi", "")
    printed = choose(checkout, index[0])
    assert "options: \n" in printed and "CUDA libraries" in printed
    assert index[1] == []


def test_an_index_that_refuses_or_hangs_is_not_waited_for(checkout):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        port = silent.getsockname()[1]
        printed = choose(checkout, f"http://127.0.0.1:{port}")
        assert time.monotonic() - start < 15
    assert "options: \n" in printed and "does not answer" in printed
    refused = choose(checkout, f"http://127.0.0.1:{port}")
    assert "options: \n" in refused and "does not answer" in refused


def test_what_several_extras_need_is_examined(checkout):
    (checkout / "pyproject.toml").write_text(
        '[project]\ndependencies = ["pip"]\n'
        "[project.optional-dependencies]\n"
        'plot = ["no-such-plot"]\nislands = ["no-such-link"]\ndocs = ["no-such-docs"]\n'
    )
    script = f"source launch_scripts/environment.sh; examine {sys.executable} plot,islands"
    code, printed = run("bash", "-ec", script, cwd=checkout)
    assert code == 0 and "missing no-such-plot\nmissing no-such-link\n" in printed and "docs" not in printed


USE = "source launch_scripts/environment.sh; CPU_INDEX=$INDEX unused=none; use_venv"


def use_venv(checkout: Path, url: str) -> str:
    variables = plain(checkout, INDEX=url)
    code, printed = run("env", *(f"{k}={v}" for k, v in variables.items()), "bash", "-ec", USE, cwd=checkout)
    assert code == 0, printed
    return printed


def test_the_set_up_installs_with_it(checkout, index):
    assert "CPU build" in use_venv(checkout, index[0])
    (line,) = (checkout / "installed").read_text().splitlines()
    assert f" --extra-index-url {index[0]} -e {checkout}[test]" in line


def test_an_environment_that_has_torch_keeps_it(checkout, index):
    (checkout / "has").write_text("torch==2.13.0\n")
    assert "CPU build" not in use_venv(checkout, index[0])
    assert "--extra-index-url" not in (checkout / "installed").read_text()


def test_a_cpu_build_beside_a_gpu_is_pointed_out(checkout, index):
    (checkout / "has").write_text("torch==2.13.0+cpu\n")
    assert "warning" not in use_venv(checkout, index[0])
    program(checkout / "tools/nvidia-smi", "")
    assert "warning: .venv has PyTorch's CPU build" in use_venv(checkout, index[0])

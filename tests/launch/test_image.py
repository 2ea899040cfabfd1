"""launch_scripts/Dockerfile, read and followed as far as that goes without Docker."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.launch.scripts import ROOT, SCRIPTS, environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = (SCRIPTS / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(name: str) -> list[str]:
    """Return the arguments of every instruction of a name, continued lines joined."""
    lines = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", "").splitlines()
    return [line.removeprefix(f"{name} ").strip() for line in lines if line.startswith(f"{name} ")]


ARGUMENTS = dict(line.split("=", 1) for line in instructions("ARG"))
VOLUMES = json.loads(instructions("VOLUME")[0])


def test_the_base_is_pinned_and_its_python_fits():
    (base,) = instructions("FROM")
    version = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-[a-z]+", base)[1]
    assert version in SpecifierSet(PROJECT["requires-python"])


def test_torch_fits():
    (required,) = [one for text in PROJECT["dependencies"] if (one := Requirement(text)).name == "torch"]
    assert ARGUMENTS["TORCH"] in required.specifier


def test_it_installs_what_the_project_requires():
    (code,) = re.findall(r'python -c "([^"]*)" >/tmp/requirements.txt', "\n".join(instructions("RUN")))
    listed = subprocess.run(
        [sys.executable, "-c", code.replace("tomllib", tomllib.__name__)],
        cwd=ROOT,
        env={**os.environ, "EXTRAS": "plot watch"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    extras = PROJECT["optional-dependencies"]
    assert listed == [*PROJECT["dependencies"], *extras["plot"], *extras["watch"]]


def test_its_processes_are_not_of_root_and_write_where_they_may():
    assert instructions("USER")[-1] == "1000:1000" and "--uid 1000" in TEXT
    assert f"install -d -o relora -g relora {' '.join(VOLUMES)}" in instructions("RUN")[0]
    assert instructions("WORKDIR")[-1] in VOLUMES
    written = dict(pair.split("=") for pair in instructions("ENV")[0].split())
    assert all(value.startswith("/cache/") for value in written.values()) and "RELORA_DS_CACHE" in written


def test_docker_waits_longer_than_the_launch_scripts():
    pages = TEXT + (ROOT / "docs/guides/clusters.md").read_text(encoding="utf-8")
    commands = re.findall(r"docker run --rm --gpus all (?:[^\n]*\\\n)+[^\n]*", pages)
    assert len(commands) == 2
    for command in commands:
        assert int(re.search(r"--stop-timeout (\d+)", command)[1]) >= 30 + 10
        assert (
            all(f":{volume}" in command for volume in json.loads(instructions("VOLUME")[0])) and "--shm-size" in command
        )


@pytest.mark.parametrize(
    ("recipe", "code", "said"),
    [
        (["tiny", "relora.r=0"], 2, "relora.r: 0 is not"),
        pytest.param(["tiny"], 0, "model: runs/tiny/export", marks=pytest.mark.slow),
    ],
)
def test_what_is_copied_is_enough_to_train(recipe, code, said, tmp_path):
    image, work = tmp_path / "image", tmp_path / "work"
    image.mkdir()
    work.mkdir()
    for line in instructions("COPY"):
        *names, target = line.split()
        for path in (ROOT / name for name in names):
            if path.is_dir():
                shutil.copytree(path, image / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, image / target)
    tini, end, shell, script = json.loads(instructions("ENTRYPOINT")[0])
    assert (tini, end, shell) == ("tini", "--", "bash") and "tini" in ARGUMENTS["PACKAGES"].split()
    place = Path(script).relative_to(instructions("WORKDIR")[0])
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [shell, image / place, *recipe], cwd=work, env=variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code and said in done.stdout + done.stderr, done.stdout + done.stderr
    assert (work / "runs").exists() == (code == 0)

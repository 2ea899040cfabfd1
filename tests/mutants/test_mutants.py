"""The tests notice known mistakes: each is patched into a copy of the source, and its tests must go red there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
PATCHES = Path(__file__).with_name("patches")
TESTS_FAILED = 1  # pytest's exit codes: 2 is an error while collecting, 4 a node id that does not exist


def run(directory: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(directory), "GIT_CEILING_DIRECTORIES": str(directory.parent)}
    return subprocess.run(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_tests(directory: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess:
    return run(directory, sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests)


def copy_source(directory: Path) -> Path:
    for name in ("relora_ds", "tests", "ds_configs"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


@pytest.fixture(scope="session")
def copy_is_green(tmp_path_factory) -> None:
    directory = copy_source(tmp_path_factory.mktemp("unchanged"))
    found = run(directory, sys.executable, "-c", "import relora_ds; print(relora_ds.__file__)").stdout.split()[-1]
    assert Path(found).is_relative_to(directory), f"the copy imports {found}: its tests would show nothing"
    result = run_tests(directory, tuple(sorted({test for mutant in MUTANTS for test in mutant.tests})))
    assert result.returncode == 0, f"without any mistake:\n{result.stdout[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mistake_is_noticed(mutant: Mutant, copy_is_green, tmp_path):
    directory = copy_source(tmp_path)
    applied = run(directory, "git", "apply", str(PATCHES / f"{mutant.name}.patch"))
    assert applied.returncode == 0, f"the patch does not apply to the current source:\n{applied.stdout}"
    result = run_tests(directory, mutant.tests)
    assert result.returncode == TESTS_FAILED, f"{mutant.name} went unnoticed:\n{result.stdout[-4000:]}"
    assert mutant.says in result.stdout, f"{mutant.name} fails for another reason:\n{result.stdout[-4000:]}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_patch_applies(mutant: Mutant, tmp_path):
    shutil.copytree(ROOT / "relora_ds", tmp_path / "relora_ds", ignore=shutil.ignore_patterns("__pycache__"))
    applied = run(tmp_path, "git", "apply", "--check", str(PATCHES / f"{mutant.name}.patch"))
    assert applied.returncode == 0, f"make the patch again:\n{applied.stdout}"


def test_every_patch_is_listed():
    assert {path.stem for path in PATCHES.glob("*.patch")} == {mutant.name for mutant in MUTANTS}

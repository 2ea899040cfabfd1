"""Results name the commit of the code that made them."""

import subprocess

import pytest

from relora_ds.utils.git import commit_of


@pytest.fixture
def package(tmp_path):
    """A package in a repository, which ignores `env`."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text("env\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"], ["tag", "v1"]):
        git(tmp_path, *arguments)
    return package


def git(directory, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(directory), *settings, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_checkout(package):
    assert commit_of(package) == git(package, "rev-parse", "HEAD")


def test_a_changed_checkout_is_marked(package):
    (package / "new.py").write_text("")  # tells nothing: runs and notes lie in checkouts too
    assert not commit_of(package).endswith("-dirty")
    (package / "__init__.py").write_text("changed = True\n")
    assert commit_of(package) == git(package, "rev-parse", "HEAD") + "-dirty"


def test_what_is_installed_into_a_repository_is_not_of_it(package):
    installed = package.parent / "env" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert commit_of(installed) == "unknown"


def test_without_git(package, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit_of(package) == "unknown"

"""The commit of the code that runs."""

import subprocess
from pathlib import Path


def commit_of(package: Path) -> str:
    """Return the git commit that the files of a Python package are from.

    Args:
        package: its folder, with an `__init__.py`.

    Returns:
        The hash, followed by `-dirty` where files of the checkout differ from it; "unknown" where the package is not
        tracked by git: an installed one has no commit, also where it is installed into the folder of a repository.
    """
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

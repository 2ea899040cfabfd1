"""A job that its scheduler or launcher starts again, with the command of its first start.

That command may say `overwrite=true`, or nothing about a run that exists already. Taken at its word, the second start
would delete what the first one has saved, or refuse it.

torchrun also repeats a start that was refused. Such a repetition continues nothing: it must not resume the very run
that it was refused for. So a refused first start leaves a mark in torchrun's log directory of that attempt.
"""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from relora_ds.config import Recipe

_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
_REFUSED = "refused"  # the name of the mark
# {variable: its value at the first start}: Slurm, torchrun, AWS Batch, Google Cloud Batch, LSF, Grid Engine
FIRST_START = {
    "SLURM_RESTART_COUNT": "0",
    _ATTEMPT: "0",
    "AWS_BATCH_JOB_ATTEMPT": "1",
    "BATCH_TASK_RETRY_ATTEMPT": "0",
    "LSB_RESTART": "N",
    "RESTARTED": "0",
}


def restarted_by(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the variable, with its value, that marks this start as a repeated one; None at a job's first start."""
    return next(
        (
            f"{name}={environment[name]}"
            for name, first in FIRST_START.items()
            if environment.get(name, "") not in ("", first) and not (name == _ATTEMPT and _was_refused(environment))
        ),
        None,
    )


def remember_refusal(environment: Mapping[str, str] = os.environ) -> None:
    """Let torchrun's next attempt know that this start began nothing. After a restart there is something to resume."""
    if "TORCHELASTIC_ERROR_FILE" in environment and restarted_by(environment) is None:
        with contextlib.suppress(OSError):
            Path(environment["TORCHELASTIC_ERROR_FILE"]).with_name(_REFUSED).touch()


def _was_refused(environment: Mapping[str, str]) -> bool:
    """Return True if torchrun's attempt before this one was refused; its files are in …/attempt_N/LOCAL_RANK/."""
    directory, attempt = Path(environment.get("TORCHELASTIC_ERROR_FILE", "")).parent, environment[_ATTEMPT]
    return (
        attempt.isdecimal()
        and (directory.parent.parent / f"attempt_{int(attempt) - 1}" / directory.name / _REFUSED).exists()
    )


def as_restarted(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Return (the recipe as this start means it, a line about what it means differently or None).

    A restarted job resumes its own run: `resume=auto`. One that began from another run's checkpoint begins there again
    as long as it has saved none of its own.
    """
    from relora_ds.checkpoint import store

    variable = restarted_by()
    if variable is None or recipe.run_dir is None or recipe.resume == "auto":
        return recipe, None
    if recipe.resume and not store.directories(recipe.directory / "checkpoints"):
        return recipe, None
    asked = " and ".join(
        ([f"resume={recipe.resume}"] if recipe.resume else []) + (["overwrite=true"] if recipe.overwrite else [])
    )
    instead = f", not {asked}" if asked else ""
    return dataclasses.replace(recipe, resume="auto", overwrite=False), (
        f"resume: this job was restarted ({variable}), which means resume=auto{instead}; unset the variable for a "
        "start that is no restart"
    )

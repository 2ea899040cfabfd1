"""What may be done with a run directory: begin in it, resume in it, overwrite the run in it, or nothing.

The rule is asked twice. Preflight asks early, so that a mistake costs seconds. Minutes later, when the tokens are
ready, rank 0 locks the directory and asks again: another start may have been there in the meantime. What the second
answer allows is done under the same lock.
"""

import contextlib
import glob
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from relora_ds.checkpoint import store
from relora_ds.config import DS_CONFIG_DIR, Recipe
from relora_ds.data import localfiles
from relora_ds.data.cache import cache_root
from relora_ds.training import run_contents
from relora_ds.training.lock import Lock, lock
from relora_ds.training.requeue import restarted_by
from relora_ds.training.run_contents import Contents

logger = logging.getLogger(__name__)

SHOWN = 5  # names in a message


class Claim:
    """A run directory that this process has locked. Rank 0 has it.

    Until `begin`, `close` leaves everything as it was before: no directory, no lock file, no other holder's name.
    """

    def __init__(self, recipe: Recipe):
        """Make the directory, lock it and look.

        Raises:
            ValueError: it is another process's, holds what this run may not touch, or cannot be written.
        """
        self._run_dir, self._overwrite = recipe.directory, recipe.overwrite
        self._made: list[Path] = []
        self._lock: Lock | None = None
        self._has_begun = False
        try:
            self._make()
            self._lock = lock(self._run_dir)
            self._directory = os.stat(self._run_dir)
            if found := problems(recipe):
                raise ValueError("\n".join(found))
        except OSError as error:
            self.close()
            raise ValueError(_cannot_be_written(recipe, error.filename or recipe.run_dir, error.strerror)) from error
        except ValueError:
            self.close()
            raise

    def begin(self) -> None:
        """Make the directory this run's: delete the run that is to be overwritten."""
        self._has_begun = True
        if self._overwrite:
            run_contents.delete(self._run_dir)

    @property
    def previous_holder(self) -> str:
        """The process that had the directory before, which has died or ended; "" where there was none."""
        return "" if self._lock is None else self._lock.before.strip()

    def is_held(self) -> bool:
        """Return False once the directory, or its lock file, was moved or deleted."""
        return self._lock is not None and self._lock.is_held()

    def renew(self) -> None:
        """Make and lock the directory again if it is not held any more.

        Raises:
            ValueError: another run is, or was, where it had been.
        """
        if self.is_held():
            return
        if self._lock is not None:
            self._lock.close()
        self._make()
        self._lock = lock(self._run_dir)
        now = os.stat(self._run_dir)
        if not os.path.samestat(now, self._directory):
            found = run_contents.look(self._run_dir)
            if found.is_begun or found.claimed:
                raise ValueError(
                    f"run_dir: {self._run_dir} was moved or deleted while its run trained, and another "
                    "run is there now; resume the moved one under its new name"
                )
            logger.warning(
                "run_dir: %s was moved or deleted while its run trained; the run continues in a new directory "
                "of that name",
                self._run_dir,
            )
        self._directory = now

    def close(self) -> None:
        """Free the directory."""
        if self._lock is not None:
            (self._lock.close if self._has_begun else self._lock.undo)()
        if not self._has_begun:
            for directory in reversed(self._made):
                try:
                    directory.rmdir()
                except OSError:  # another start is in it
                    break

    def _make(self) -> None:
        for directory in (*reversed(self._run_dir.parents), self._run_dir):
            if directory.is_dir():
                continue
            try:
                directory.mkdir()
                self._made.append(directory)
            except FileExistsError:  # another start made it
                continue


def early_problems(recipe: Recipe, recipe_files: Sequence[Path] = ()) -> list[str]:
    """Return why this run cannot be in its run directory, as far as one look before anything is prepared can tell.

    recipe_files: that the recipe was read from.
    """
    found = problems(recipe)
    if recipe.overwrite and recipe.directory.is_dir():
        return found + _inputs_inside(recipe, recipe_files)
    if not (found or recipe.resume == "auto" or resumes_in_place(recipe)):
        # Asked only now: what the run itself puts there before the lock, such as a token cache, is no obstacle.
        foreign = run_contents.look(recipe.directory).foreign
        return [_no_run(recipe, foreign)] if foreign else []
    return found


def problems(recipe: Recipe) -> list[str]:
    """Return why this run cannot begin, resume or overwrite what is in its run directory."""
    run_dir = recipe.directory
    if reason := _unusable(run_dir):
        return [_cannot_be_written(recipe, *reason)]
    try:
        if outer := run_contents.run_around(run_dir):
            return [f"run_dir: {recipe.run_dir} lies in what the run {outer} writes; choose a directory outside of it"]
        contents = run_contents.look(run_dir)
        return [found for found in (_resume_problem(recipe), _contents_problem(recipe, contents)) if found]
    except OSError as error:
        return [_cannot_be_written(recipe, error.filename or recipe.run_dir, error.strerror)]


def _contents_problem(recipe: Recipe, contents: Contents) -> str | None:
    run_dir = recipe.directory
    if recipe.overwrite:
        if contents.foreign:
            return _mixed(recipe, contents.foreign) if contents.is_run else _no_run(recipe, contents.foreign)
        return None
    if contents.claimed:
        return _no_run(recipe, contents.claimed)
    has_checkpoints = bool(store.directories(run_dir / "checkpoints"))
    if recipe.resume == "auto":
        # Those of a store are looked for under the lock.
        return next(iter([] if recipe.checkpoint.remote else lost_checkpoints(recipe)), None)
    if not contents.is_begun or resumes_in_place(recipe):
        return None
    if recipe.resume and restarted_by() and not has_checkpoints and not run_contents.saved_before(run_dir):
        return None  # the job's earlier start died before its first checkpoint
    return (
        f"run_dir: {recipe.run_dir} holds a run already; set resume=auto to continue it, overwrite=true to delete "
        "it, or another run_dir"
    )


def lost_checkpoints(recipe: Recipe) -> list[str]:
    """Return why `resume=auto` must not begin anew: the run had checkpoints, and has none."""
    run_dir = recipe.directory
    has_checkpoints = bool(store.directories(run_dir / "checkpoints"))
    saved = None if has_checkpoints else run_contents.saved_before(run_dir)
    if not saved:
        return []
    return [
        f"resume: auto, but {recipe.run_dir} has no checkpoint left, and the run had some ({saved}); a start from "
        "the beginning would replace what it left. Put checkpoints/ back, or set overwrite=true to delete the run, "
        "or another run_dir"
    ]


def _resume_problem(recipe: Recipe) -> str | None:
    """Refuse a path in the run directory that is no checkpoint of its run: the run would overwrite its own source."""
    if not isinstance(recipe.resume, str) or recipe.resume == "auto" or resumes_in_place(recipe):
        return None
    run_dir, source = recipe.directory.resolve(), Path(recipe.resume).resolve()
    if run_dir not in source.parents:
        return None
    return (
        f"resume: {recipe.resume} lies in run_dir {recipe.run_dir}, but is no checkpoint of its run "
        "(run_dir/checkpoints/step_…); use another run_dir, or resume=auto to continue the run in it"
    )


def resumes_in_place(recipe: Recipe) -> bool:
    """Return True if `resume` names the run in the run directory, or one of its checkpoints."""
    if not isinstance(recipe.resume, str) or recipe.resume == "auto":
        return False
    checkpoints = recipe.directory / "checkpoints"
    places = (recipe.directory, checkpoints, *store.directories(checkpoints))
    return Path(recipe.resume).resolve() in [place.resolve() for place in places]


def _unusable(run_dir: Path) -> tuple[Path, str] | None:
    """Return (the place, what is wrong with it) where the run directory cannot be made or written."""
    place = run_dir.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return place, "it is no directory"
    return None if os.access(place, os.W_OK | os.X_OK) else (place, "no permission, or a read-only file system")


def _cannot_be_written(recipe: Recipe, place: object, why: str | None) -> str:
    return (
        f"run_dir: {recipe.run_dir} cannot be written ({place}: {why}); choose another one, or make this one writable"
    )


def _mixed(recipe: Recipe, foreign: Sequence[str]) -> str:
    return (
        f"run_dir: {recipe.run_dir} holds a run and {_some(foreign)}, which no run writes; overwrite=true deletes "
        "nothing else than a run, so move these elsewhere, or choose another run_dir"
    )


def _no_run(recipe: Recipe, foreign: Sequence[str]) -> str:
    return (
        f"run_dir: {recipe.run_dir} exists and holds something that is not a run of relora_ds ({_some(foreign)}); "
        "neither resume=auto nor overwrite=true touches it: choose another one"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _inputs_inside(recipe: Recipe, recipe_files: Sequence[Path]) -> list[str]:
    """Return a message for each input in the directory that `overwrite` empties first."""
    run_dir = recipe.directory.resolve()
    found = []
    for field, value in _inputs(recipe, recipe_files):
        if any(run_dir in (place, *place.parents) for place in _places(field, value)):
            found.append(
                f"{field}: {value} lies in run_dir {recipe.run_dir}, which overwrite=true deletes; move it "
                "elsewhere, or use another run_dir"
            )
    return found


def _inputs(recipe: Recipe, recipe_files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield (field, path) of all that may be a local file or directory."""
    yield from (("--config", str(path)) for path in recipe_files)
    data = recipe.data
    values = {
        "init_from": recipe.init_from,
        "resume": recipe.resume,
        "model.name_or_path": recipe.model.name_or_path,
        "data.source": data.source,
        "data.path": data.path,
        "data.validation": data.validation,
        "data.tokenizer": data.tokenizer,
    }
    if not (DS_CONFIG_DIR / f"{recipe.deepspeed}.json").is_file():
        values["deepspeed"] = recipe.deepspeed
    yield from ((field, value) for field, value in values.items() if isinstance(value, str))
    yield ("data.cache_dir" if data.cache_dir else "RELORA_DS_CACHE"), str(cache_root(data))


def _places(field: str, value: str) -> Iterator[Path]:
    """Yield where an input really is: the path, what a glob matches, and what links in a directory point to."""
    path = Path(value).expanduser()
    if glob.has_magic(value):
        path = Path(re.split(r"[*?\[]", str(path))[0])
    if os.path.lexists(path) or field in ("data.cache_dir", "RELORA_DS_CACHE"):  # else a name, or not there yet
        yield path.resolve()
    if field in ("data.path", "data.validation"):
        with contextlib.suppress(ValueError, OSError), warnings.catch_warnings():  # reported by its own check
            warnings.simplefilter("ignore")
            yield from (file.resolve() for file in localfiles.find(value, field))
    elif path.is_dir():
        for directory, subdirectories, files in os.walk(path):
            yield from (
                Path(entry).resolve()
                for name in (*subdirectories, *files)
                if os.path.islink(entry := os.path.join(directory, name))
            )

"""A run in a store: where its files are there, which checkpoints are complete, what is deleted.

It has the layout of a run directory, so a copy of it is one. The manifest of a checkpoint is uploaded last and deleted
first: a checkpoint without one is none.
"""

import contextlib
from collections import defaultdict
from pathlib import Path

import yaml

from relora_ds.checkpoint import manifest
from relora_ds.checkpoint.removal import REPLACED
from relora_ds.checkpoint.run_files import METRICS
from relora_ds.checkpoint.store import NAME_OF_A_STEP, kept, step_of
from relora_ds.remote.place import Place, RemoteMissingError

RECIPE, TOKENIZER = "recipe.yaml", "checkpoints/tokenizer"
_SMALL = (RECIPE, METRICS, "summary.json")


class StoredRun:
    """The run in a place of a store."""

    def __init__(self, place: Place):
        self.place = place

    def checkpoints(self) -> dict[str, dict[str, int]]:
        """Return `{tag: {file: bytes}}` of all that is there of checkpoints, complete or not."""
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for path, size in self.place.files("checkpoints").items():
            _, tag, *rest = path.split("/")
            if NAME_OF_A_STEP.fullmatch(tag) and len(rest) == 1:
                found[tag][rest[0]] = size
        return dict(found)

    def complete(self) -> list[str]:
        """Return the tags of the complete checkpoints, newest first."""
        return newest_first(tag for tag, files in self.checkpoints().items() if manifest.NAME in files)

    def begun_in(self) -> str | None:
        """Return the `run_dir` of the run that is there; "" where that cannot be read, None where there is no run."""
        try:
            recipe = yaml.safe_load(self.place.read(RECIPE))
            return str(recipe["run_dir"])
        except RemoteMissingError:
            return "" if self.complete() else None
        except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError):
            return ""

    def put_small_files(self, run_dir: Path, with_tokenizer: bool) -> None:
        """Upload the files that go with checkpoints, as they are now."""
        paths = [run_dir / name for name in _SMALL]
        if with_tokenizer:
            paths += sorted(path for path in (run_dir / TOKENIZER).rglob("*") if path.is_file())
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # a run can do without
                self.place.write(path.relative_to(run_dir).as_posix(), path.read_bytes())

    def prune(self, keep_last: int, keep_every: int | None) -> None:
        """Delete what the retention rule does not keep, and what uploads that were broken off left."""
        found = self.checkpoints()
        stay = kept(newest_first(tag for tag in found if manifest.NAME in found[tag]), keep_last, keep_every)
        for tag in found.keys() - stay:
            self._delete(tag, found[tag])

    def break_up(self, tag: str) -> None:
        """Make a checkpoint that is there incomplete, as its files are about to be replaced."""
        self.place.delete(path_of(tag, manifest.NAME))

    def drop_after(self, step: int) -> None:
        """Move the checkpoints past `step`, which the run will write anew, to `checkpoints/replaced/`."""
        found = self.checkpoints()
        for tag in found:
            if step_of(tag) > step:
                for name in sorted(found[tag], key=lambda name: name != manifest.NAME):
                    self.place.copy(path_of(tag, name), f"checkpoints/{REPLACED}/{tag}/{name}")
                    self.place.delete(path_of(tag, name))

    def delete(self) -> None:
        """Delete what a run has uploaded, and nothing else. The recipe goes last: until then it is a run."""
        for tag, files in self.checkpoints().items():
            self._delete(tag, files)
        others = [*self.place.files(TOKENIZER), *self.place.files(f"checkpoints/{REPLACED}")]
        for path in (*others, *reversed(_SMALL)):
            self.place.delete(path)

    def _delete(self, tag: str, files: dict[str, int]) -> None:
        for name in sorted(files, key=lambda name: name != manifest.NAME):
            self.place.delete(path_of(tag, name))


def path_of(tag: str, name: str) -> str:
    """Return where a file of a checkpoint is."""
    return f"checkpoints/{tag}/{name}"


def newest_first(tags) -> list[str]:
    """Return the tags of checkpoints, those of the last steps first."""
    return sorted(tags, key=step_of, reverse=True)

"""manifest.json: what a checkpoint is of and what it consists of. It is written last: a checkpoint without one is none.

A checkpoint is one directory:

    manifest.json               step, the state of run and engine, the model's tensors, every other file with its sha256
    trained_00000.safetensors   what trains, of rank 0: its ranges of fp32 masters, exp_avg and exp_avg_sq
    frozen_00000.safetensors    what is frozen, of rank 0: the weights that it owns, whole
    config.json                 of the model, for transformers

Frozen weights change at restarts only. Checkpoints of the same cycle have the same files of them: hard links, so that
each directory is whole, and the bytes are there once for as long as one of them needs them.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from relora_ds.checkpoint import files

NAME = "manifest.json"
LATEST = "latest"  # beside the checkpoints: the newest one's name
FORMAT = 1
TRAINED, FROZEN = "trained", "frozen"
# No directory, no "..": what a manifest names cannot be outside of its checkpoint.
_FILE = re.compile(r"(trained|frozen)_\d{5}\.safetensors|(generation_)?config\.json")


class DamagedError(ValueError):
    """A checkpoint is not what was written; the message names the file."""


@dataclasses.dataclass(frozen=True)
class File:
    """Attributes: size: bytes; sha256: of the contents; host: that wrote it, for those who look for it."""

    size: int
    sha256: str
    host: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What stands in manifest.json.

    Attributes:
        step: applied steps of the run.
        run: the trainer's own state, see `training.trainer`.
        engine: see `zero.engine_state`.
        model: `{"parameters": {name: {"shape", "trains"}}, "layers": {name: {"scaling", "base", "shape"}}, "frozen":
            the fields of `zero.frozen_master.Storage`, "relora": the fields of the `ReLoRAConfig`, or None}`.
        restarts: how many there were when the frozen weights were written.
        files: by name.
        versions: of the libraries that wrote it.
    """

    step: int
    run: dict
    engine: dict
    model: dict
    files: dict[str, File]
    versions: dict[str, str]

    def write(self, directory: Path) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        files.write_json(directory / NAME, {"sha256": _digest(content), **content})


def read(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedError: it is missing, cut short, of another version, or names what is no file of a checkpoint.
    """
    path = directory / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("sha256") != _digest(content):
            raise DamagedError(f"{path} is not what was written (its sha256 differs)")
        version = content.pop("format")
        if version != FORMAT:
            raise DamagedError(f"{path} has format {version}; this version of relora_ds reads {FORMAT}")
        listed = {name: File(**about) for name, about in content.pop("files").items()}
        found = Manifest(files=listed, **content)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    if strange := [name for name in listed if not _FILE.fullmatch(name)]:
        raise DamagedError(f"{path} names {strange[0]!r}, which is no file of a checkpoint")
    return found


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tag_of(step: int) -> str:
    """The directory name of the checkpoint after `step` applied steps."""
    return f"step_{step:08d}"


def damage(directory: Path, name: str, file: File) -> str | None:
    """What is wrong with one file of a checkpoint: one line, or None."""
    path = directory / name
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"{path} has {size} bytes instead of {file.size}"
        if files.sha256(path) != file.sha256:
            return f"{path} is not what was written (its sha256 differs)"
    except FileNotFoundError:
        return f"{path} is missing (host {file.host} wrote it)"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None

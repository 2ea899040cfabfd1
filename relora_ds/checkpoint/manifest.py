"""manifest.json: what a checkpoint captures and consists of. It is written last: a checkpoint without one is none.

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
import os
import re
from pathlib import Path

from relora_ds.utils import files

NAME = "manifest.json"
LATEST = "latest"  # beside the checkpoints: the newest one's name
FORMAT = 1
TRAINED, FROZEN = "trained", "frozen"
# No directory, no "..": what a manifest names cannot be outside of its checkpoint.
_FILE = re.compile(r"(trained|frozen)_\d{5}\.safetensors|(generation_)?config\.json")


# All that may be in a checkpoint's directory: the manifest may be being written, a model may have code of its own.
IN_CHECKPOINT = re.compile(rf"manifest\.json(\..+\.tmp)?|{_FILE.pattern}|\w+\.py")


class DamagedError(ValueError):
    """A checkpoint is provably not what was written; the message names the file."""


class MissingError(DamagedError):
    """A file of a checkpoint is not there."""


class UnreadableError(ValueError):
    """A checkpoint cannot be read now, or not by this version; it may be intact. The message names the file."""


@dataclasses.dataclass(frozen=True)
class File:
    """Attributes: size: bytes; sha256: of the contents; host: that wrote it, for messages."""

    size: int
    sha256: str
    host: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What stands in manifest.json.

    Attributes:
        step: applied steps of the run.
        run: what was saved beside the engine: the trainer's own state, or `client_state`, see
            `checkpoint.client_state`.
        engine: see `zero.engine_state`.
        model: `{"parameters": {name: {"shape", "trains"}}, "layers": {name: `LowRankLayer.about()`}, "frozen":
            the fields of `lowrank.storage.Storage`, "relora": the fields of the `ReLoRAConfig`, or None}`.
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

    @property
    def is_of_run(self) -> bool:
        """Return True if a run's trainer wrote it, False for a loop of its own."""
        return {"recipe", "phase", "account", "total_steps"} <= self.run.keys()

    def write(self, directory: Path) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        files.write_json(directory / NAME, {"sha256": _digest(content), **content})


def read(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        DamagedError: it is missing, cut short, or names what is no file of a checkpoint.
        UnreadableError: it cannot be read now, or a newer version of relora_ds wrote it.
    """
    path = directory / NAME
    try:
        content = json.loads(_read_bytes(path))
        saved_digest, version = content.pop("sha256"), content["format"]
        if isinstance(version, int) and version > FORMAT:  # its digest may be another one, too
            raise UnreadableError(
                f"{path} was written by a newer relora_ds (format {version}; this one reads {FORMAT}): update relora_ds"
            )
        if saved_digest != _digest(content):
            raise DamagedError(f"{path} is not what was written (its sha256 differs)")
        if content.pop("format") != FORMAT:
            raise DamagedError(f"{path} has format {version}; this version of relora_ds reads {FORMAT}")
        listed = {name: File(**about) for name, about in content.pop("files").items()}
        found = Manifest(files=listed, **content)
    except (DamagedError, UnreadableError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read as a manifest ({str(error).splitlines()[0]})") from error
    if strange := [name for name in listed if not _FILE.fullmatch(name)]:
        raise DamagedError(f"{path} names {strange[0]!r}, which is no file of a checkpoint")
    return found


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MissingError(f"{path} is missing") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read now: {error.strerror}") from error


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tag_of(step: int) -> str:
    """Return the directory name of the checkpoint after `step` applied steps."""
    return f"step_{step:08d}"


def is_needed(name: str) -> bool:
    """Return True for a file without which a run cannot resume; the model's configuration is in the manifest, too."""
    return name == NAME or name.endswith(".safetensors")


def check(directory: Path, name: str, file: File, contents: bool = True) -> None:
    """Check that one file of a checkpoint is what was written.

    Args:
        contents: False compares the sizes only.

    Raises:
        DamagedError: it is not. MissingError: it is not there. UnreadableError: that cannot be told now.
    """
    path = directory / name
    try:
        with path.open("rb") as opened:  # a network disk may answer stat() from memory; what is opened is looked up
            size = os.fstat(opened.fileno()).st_size
            if size != file.size:
                raise DamagedError(f"{path} has {size} bytes instead of {file.size}")
            if contents and files.sha256(opened) != file.sha256:
                raise DamagedError(f"{path} is not what was written (its sha256 differs)")
    except FileNotFoundError:
        raise MissingError(f"{path} is missing (host {file.host} wrote it)") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read now: {error.strerror}") from error

"""What is in a run directory: what a run writes there, and everything else.

A name alone proves nothing: other programs write a `recipe.yaml` or a `checkpoints/` too. A directory counts as a run
when one of its files has the contents that a run writes. Only in such a directory are our names taken for ours.
"""

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from relora_ds.checkpoint import manifest, store
from relora_ds.checkpoint.removal import remove
from relora_ds.checkpoint.run_files import metrics_in

# {pattern of a name: None for a file, _WHOLE for a directory with another program's files, else the same for what is in
# that directory}. All that a run writes, and the figures of it that quickstart.sh adds.
_WHOLE: dict = {}
_TOKENIZER = {
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|processor_config|tekken)\.json": None,
    r"\.tokenizer_config\.json\..+": None,  # being written
    r"chat_template\.jinja|merges\.txt|vocab\.\w+|[\w.-]+\.(model|spm|tiktoken)": None,
    r"additional_chat_templates": {r".+\.jinja": None},
    r"\w+\.py": None,  # the code of a model or tokenizer that is not transformers' own
}
_CONFIG = {r"(generation_)?config\.json": None, r"\w+\.py": None}
_CHECKPOINT = {r"manifest\.json(\..+\.tmp)?": None, r"(trained|frozen)_\d{5}\.safetensors": None, **_CONFIG}
_RUN = {
    r"(recipe\.yaml|status\.json|summary\.json|metrics\.jsonl)(\..+\.tmp)?|metrics\.tmp|lock": None,
    r"tensorboard": {r"events\.out\.tfevents\..+": None},
    r"wandb": {r"(offline-)?run-\d{8}_\d{6}-\w+": _WHOLE, r"(settings|debug.*\.log|wandb-resume\.json)": None},
    r"mlflow": {r"mlflow\.db(-\w+)?": None, r"artifacts": _WHOLE},
    r"trackio": {r"relora_ds\.(db(-\w+)?|lock)": None, r"media": _WHOLE},
    r"plots": {r"index\.html|(loss|learning_rate|throughput|traffic)\.png": None},
    r"checkpoints": {
        r"latest(\..+\.tmp)?|\.[0-9a-f-]{36}_rank_\d+": None,
        r"tokenizer": _TOKENIZER,
        r"replaced": {r"step_\d{8,}(\.\d+)?": _CHECKPOINT},  # what a run went back behind
        r"\.?step_\d{8,}(\.\w+)*": _CHECKPOINT,  # also one that is being written, deleted or was renamed
    },
    r"export": {
        r"README\.md(\..+\.tmp)?|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?": None,
        **_CONFIG,
        **_TOKENIZER,
    },
}
# File systems put these anywhere; nobody's work is in them.
_OF_THE_FILE_SYSTEM = re.compile(r"lost\+found|\.nfs\w+|\.snapshots?")
# What `delete` leaves to be replaced: with them an interrupted deletion is still a run, and of no lost checkpoint.
_LAST = ("lock", "status.json", "recipe.yaml")
_HEAD = 1 << 20  # bytes of a file that are enough to know it


@dataclass(frozen=True)
class Contents:
    """What one look into a run directory found.

    Attributes:
        is_run: it is a run of ours, whatever else is there.
        is_begun: it is a run of ours, or has empty files of one.
        foreign: paths in it, relative to it, that no run wrote.
        claimed: those of `foreign` that a run would replace.
    """

    is_run: bool = False
    is_begun: bool = False
    foreign: tuple[str, ...] = ()
    claimed: tuple[str, ...] = ()


def look(run_dir: Path) -> Contents:
    """Tell what a run wrote from what it did not. Symbolic links are not followed: a run writes none.

    Raises:
        OSError: the directory cannot be read.
    """
    if not run_dir.is_dir():
        return Contents()
    if is_run(run_dir):
        return Contents(True, True, tuple(_foreign(run_dir, _RUN)))
    foreign, claimed, is_begun = [], [], False
    for entry in _entries(run_dir):
        known = _kind_of(entry.name, _RUN) is not _UNKNOWN
        if not (known and _is_blank(entry)):
            foreign.append(entry.name)
            claimed += [entry.name] if known else []
        elif entry.name != "lock":
            is_begun = True
    return Contents(False, is_begun, tuple(foreign), tuple(claimed))


def is_run(run_dir: Path) -> bool:
    """Return True if at least one file has the contents that a run writes; damaged ones beside it do not matter."""
    status, summary = (_json(run_dir / name) for name in ("status.json", "summary.json"))
    return (
        {"state", "step", "exit_code"} <= status.keys()
        or {"method", "step", "verdict"} <= summary.keys()
        or {"method", "seed", "run_dir", "model", "relora", "train", "data", "guard"} <= _recipe(run_dir).keys()
        or {"kind", "step", "t", "phase"} <= _first_metric(run_dir).keys()
        or any((path / manifest.NAME).is_file() for path in store.directories(run_dir / "checkpoints"))
    )


def run_around(directory: Path) -> Path | None:
    """Return the run whose checkpoints, export or curves a directory is, or is in; None where there is none."""
    inner = [name for name, what in _RUN.items() if what is not None]
    places = directory.resolve()
    return next(
        (place.parent for place in (places, *places.parents) if place.name in inner and is_run(place.parent)), None
    )


def saved_before(run_dir: Path) -> str | None:
    """Return what shows that a run without checkpoints has had some, or ended; None where nothing does."""
    if (run_dir / "summary.json").exists():
        return "it has a summary.json"
    if (state := _json(run_dir / "status.json").get("state")) in ("done", "preempted"):
        return f"its status.json says {state}"
    if (run_dir / "export").is_dir() and any((run_dir / "export").iterdir()):
        return "it has an export"
    if not (run_dir / "metrics.jsonl").exists():
        return None
    try:
        lines = metrics_in(run_dir / "metrics.jsonl")
    except OSError as error:
        return f"its metrics.jsonl cannot be read: {error.strerror}"
    if any(line["kind"] == "checkpoint" for line in lines):
        return "its metrics.jsonl lists some"
    first = _as_object(_head(run_dir / "metrics.jsonl").partition("\n")[0]).get("step")
    return "its metrics.jsonl begins with another run's checkpoint" if isinstance(first, int) and first > 0 else None


def delete(run_dir: Path) -> None:
    """Delete what a run wrote, but for the lock, status.json and recipe.yaml, which the next run replaces.

    Checkpoints go last, each by one rename: an interrupted deletion leaves no half of one.
    """
    for name in ("summary.json", "metrics.jsonl", "export", "tensorboard", "wandb", "mlflow", "trackio"):
        _delete(run_dir, {re.escape(name): _kind_of(name, _RUN)})
    checkpoints = run_dir / "checkpoints"
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        _delete(checkpoints, {r"\.step_\d{8,}(\.\w+)*": _CHECKPOINT})  # where a rename would put the others
        for path in store.directories(checkpoints):
            if not path.is_symlink():
                remove(path)
    _delete(run_dir, _RUN)


def _delete(directory: Path, ours: dict) -> None:
    for entry in _entries(directory):
        inner = _kind_of(entry.name, ours)
        if inner is _UNKNOWN or entry.is_symlink() or (ours is _RUN and entry.name in _LAST):
            continue
        if inner is None:
            os.unlink(entry.path)
            continue
        if inner is _WHOLE:
            shutil.rmtree(entry.path)
            continue
        _delete(Path(entry.path), inner)
        with contextlib.suppress(OSError):  # something was put there in the meantime, or it is a mount point
            os.rmdir(entry.path)


def _foreign(directory: Path, ours: dict, prefix: str = "") -> list[str]:
    found = []
    for entry in _entries(directory):
        inner = _kind_of(entry.name, ours)
        is_directory = entry.is_dir(follow_symlinks=False)
        if inner is _UNKNOWN or entry.is_symlink() or is_directory != (inner is not None):
            found.append(f"{prefix}{entry.name}" + (" (a symbolic link)" if entry.is_symlink() else ""))
        elif inner is not None and inner is not _WHOLE:
            found += _foreign(Path(entry.path), inner, f"{prefix}{entry.name}/")
    return found


def _entries(directory: Path) -> list[os.DirEntry]:
    with os.scandir(directory) as entries:
        return sorted(
            (entry for entry in entries if not _OF_THE_FILE_SYSTEM.fullmatch(entry.name)), key=lambda entry: entry.name
        )


_UNKNOWN: dict = {".": None}  # by identity: no such file


def _kind_of(name: str, ours: dict) -> dict | None:
    """Return None for a file, the patterns of a directory's contents, or _UNKNOWN."""
    return next((inner for pattern, inner in ours.items() if re.fullmatch(pattern, name)), _UNKNOWN)


def _is_blank(entry: os.DirEntry) -> bool:
    """Return True if nothing is lost with it: it is empty, or the lock of a start that wrote nothing else."""
    if entry.is_symlink():
        return False
    if entry.is_dir():
        return not any(filenames for _, _, filenames in os.walk(entry.path))
    text = _head(Path(entry.path)).strip()
    return (
        entry.stat().st_size == 0
        or text == "{}"
        or (entry.name == "lock" and re.fullmatch(r"process \d+ on \S+", text) is not None)
    )


def _head(path: Path) -> str:
    """Return the beginning of a file; "" where there is none that can be read."""
    try:
        if path.is_file():  # a pipe would wait for a writer
            with path.open(encoding="utf-8", errors="replace") as file:
                return file.read(_HEAD)
    except OSError:
        pass
    return ""


def _json(path: Path) -> dict:
    """Read a JSON object; {}, without a warning, where the file is missing, damaged or another program's."""
    return _as_object(_head(path))


def _as_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _recipe(run_dir: Path) -> dict:
    try:
        value = yaml.safe_load(_head(run_dir / "recipe.yaml"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _first_metric(run_dir: Path) -> dict:
    """Return the first line of metrics.jsonl that is not damaged."""
    return next(filter(None, map(_as_object, _head(run_dir / "metrics.jsonl").splitlines())), {})

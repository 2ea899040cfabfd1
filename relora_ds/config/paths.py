"""Check the text and the paths of a recipe."""

import dataclasses
import glob
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ds.config.merge import PATHS
from relora_ds.config.rules import nearest

if TYPE_CHECKING:
    from relora_ds.config.schema import Recipe

MAX_NAME_BYTES = 255  # of one component of a path, on the usual file systems


def text_problems(recipe: "Recipe") -> Iterator[str]:
    """Yield a message for text that no field takes: empty, with control characters, or a path that cannot be one."""
    for key, value in _texts(recipe):
        if not value.strip():
            yield f"{key}: {value!r} is empty; write a value, or null where there is to be none"
        elif any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
            yield f"{key}: {value!r} has a line break, a control character or broken UTF-8 in it; remove it"
        elif key not in PATHS:
            continue
        elif value.startswith("~"):  # what has a home directory was replaced when the recipe was read
            yield (
                f"{key}: {value} is in no known home directory; write the whole path, or ./{value} for a file of "
                "that name"
            )
        elif any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(value).parts):
            yield f"{key}: a name in {value[:60]}… is longer than {MAX_NAME_BYTES} bytes; shorten it"


def missing_files(recipe: "Recipe", ds_config_names: list[str]) -> Iterator[str]:
    """Paths at which there is nothing."""
    paths = {
        "resume": recipe.resume if recipe.resume not in (True, False, "auto") else None,
        "data.path": recipe.data.path if recipe.data.source in ("text", "c4", "pretokenized") else None,
        "data.validation": recipe.data.validation if isinstance(recipe.data.validation, str) else None,
    }
    init_from = None if recipe.resume else recipe.init_from  # a run that resumes has its weights
    for name, value in (
        ("init_from", init_from),
        ("model.name_or_path", recipe.model.name_or_path),
        ("data.source", recipe.data.source),
        ("data.tokenizer", recipe.data.tokenizer),
    ):
        if value and (value.startswith((".", "/", "~")) or value.endswith(".json")):  # else it may be a hub id
            paths[name] = value
    for name, path in paths.items():
        expanded = os.path.expanduser(path or "")
        if path and not os.path.exists(expanded) and not any(glob.iglob(expanded, recursive=True)):
            yield f"{name}: {path} does not exist; correct the path (relative ones start at {Path.cwd()})"
    if recipe.deepspeed not in ds_config_names and not os.path.isfile(os.path.expanduser(recipe.deepspeed)):
        yield (
            f"deepspeed: {recipe.deepspeed} is neither a file nor a shipped configuration"
            f"{nearest(Path(recipe.deepspeed).stem, ds_config_names)}; shipped: {', '.join(ds_config_names)}"
        )


def _texts(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """(key, text) of all fields that hold text, lists of names included."""
    for top in dataclasses.fields(recipe):
        part = getattr(recipe, top.name)
        values = (
            {top.name: part}
            if not dataclasses.is_dataclass(part)
            else {f"{top.name}.{f.name}": getattr(part, f.name) for f in dataclasses.fields(part)}
        )
        for key, value in values.items():
            for text in value if isinstance(value, (list, tuple, set)) else [value]:
                if isinstance(text, str):
                    yield key, text

"""Check the text and the paths of a recipe."""

import glob
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from relora_ds.config import fields, records
from relora_ds.config.data_config import DataConfig, of_each_corpus
from relora_ds.config.names import ds_config_names
from relora_ds.config.rules import nearest
from relora_ds.config.schema import Recipe

MAX_NAME_BYTES = 255  # of one component of a path, on the usual file systems


def text_problems(recipe: Recipe) -> Iterator[str]:
    """Yield a message for text that no field takes: empty, with control characters, or a path that cannot be one."""
    for key, value, is_path in _texts(recipe):
        if not value.strip():
            yield f"{key}: {value!r} is empty; write a value, or null where there is to be none"
        elif any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
            yield f"{key}: {value!r} has a line break, a control character or broken UTF-8 in it; remove it"
        elif not is_path:
            continue
        elif value.startswith("~"):  # what has a home directory was replaced when the recipe was read
            yield (
                f"{key}: {value} is in no known home directory; write the whole path, or ./{value} for a file of "
                "that name"
            )
        elif any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(value).parts):
            yield f"{key}: a name in {value[:60]}… is longer than {MAX_NAME_BYTES} bytes; shorten it"


def missing_files(recipe: Recipe) -> Iterator[str]:
    """Yield a message for each path at which there is nothing."""
    if isinstance(recipe.resume, str) and recipe.resume != "auto":
        yield from _missing("resume", recipe.resume)
    if not recipe.resume:  # a run that resumes has its weights
        yield from _missing_or_hub("init_from", recipe.init_from)
    yield from _missing_or_hub("model.name_or_path", recipe.model.name_or_path)
    yield from missing_data(recipe.data)
    for name in filter(is_task_file, recipe.eval.tasks):
        yield from _missing("eval.tasks", name)
    if recipe.eval.task_files:
        yield from _missing("eval.task_files", recipe.eval.task_files)
    shipped = ds_config_names()
    if recipe.deepspeed not in shipped and not os.path.isfile(os.path.expanduser(recipe.deepspeed)):
        yield (
            f"deepspeed: {recipe.deepspeed} is neither a file nor a shipped configuration"
            f"{nearest(Path(recipe.deepspeed).stem, shipped)}; shipped: {', '.join(shipped)}"
        )


def missing_data(data: DataConfig) -> Iterator[str]:
    """Yield a message for each path of the `data.` section at which there is nothing."""
    yield from of_each_corpus(data, _missing_text)
    for index, one in enumerate(data.validation_sets or ()):
        yield from _missing(f"data.validation_sets[{index}].path", one.path)
    if data.source != "pretokenized":
        yield from _missing_or_hub("data.tokenizer", data.tokenizer)


def _missing_text(data: DataConfig) -> Iterator[str]:
    if data.path and data.source in ("text", "c4", "pretokenized"):
        yield from _missing("data.path", data.path)
    if isinstance(data.validation, str) and not _is_number(data.validation):
        yield from _missing("data.validation", data.validation)
    yield from _missing_or_hub("data.source", data.source)


def is_task_file(name: str) -> bool:
    """Return True for the path of a task file, False for the name of a task."""
    return name.endswith((".yaml", ".yml"))


def _missing(key: str, path: str) -> Iterator[str]:
    expanded = os.path.expanduser(path)
    if not os.path.exists(expanded) and not any(glob.iglob(expanded, recursive=True)):
        yield f"{key}: {path} does not exist; correct the path (relative ones start at {Path.cwd()})"


def _missing_or_hub(key: str, value: str | None) -> Iterator[str]:
    """Yield a message for a path at which there is nothing; the name of something on the hub is none."""
    if value and (value.startswith((".", "/", "~")) or value.endswith((".json", "/")) or value.count("/") > 1):
        yield from _missing(key, value)


def _is_number(text: str) -> bool:
    """Return True for a fraction, which command lines deliver as text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _texts(tree: object, prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """Yield (key, text, whether it is a path) for all fields that hold text, lists of names and records included."""
    for name, field in fields.fields_of(type(tree)).items():
        key, value = f"{prefix}{name}", fields.value_of(tree, name)
        for text in value if isinstance(value, (list, tuple, set)) else [value]:
            if isinstance(text, str):
                yield key, text, field.is_path
        for inner, record in records.items(key, value):
            yield from _texts(record, inner)

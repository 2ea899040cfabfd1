"""Downstream tasks of EleutherAI's lm-eval: found and loaded, with their data, before anything is computed."""

import logging
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from relora_ds.config.paths import is_task_file
from relora_ds.config.rules import nearest
from relora_ds.data.localfiles import first_line

# What lm-eval calls a TaskDict: its objects by the kind of thing and by name.
Tasks = dict[str, dict[str, Any]]


def missing(field: str) -> str | None:
    """Return what is to be said where lm-eval is not installed, or None."""
    if find_spec("lm_eval") is None or find_spec("accelerate") is None:
        return f"{field}: lm-eval, which has the tasks, is not installed; pip install '.[tasks]'"
    return None


def load(
    names: Sequence[str],
    folder: str | None = None,
    max_length: int | None = None,
    *,
    field: str = "eval.tasks",
    folder_field: str = "eval.task_files",
) -> Tasks:
    """Return tasks with their data, which may be downloaded for it.

    Args:
        names: tasks, groups or tags of lm-eval, or paths of task files (.yaml).
        folder: a directory of task files; their names come before those of lm-eval.
        max_length: tokens that the network will be given at most; None = it is not known yet.
        field, folder_field: what the caller calls the names and the folder, for messages.

    Raises:
        ValueError: lm-eval is not installed, a task does not exist or its data cannot be had, or a network cannot be
            evaluated on it here.
    """
    if reason := missing(field):
        raise ValueError(reason)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not any(Path(folder).expanduser().rglob("*.yaml")):
        raise ValueError(f"{folder_field}: {folder} is no directory with task files (.yaml); correct the path")
    manager = _manager(names, None if folder is None else Path(folder).expanduser())
    if found := list(_unknown(names, manager.all_tasks, field, folder_field)):
        raise ValueError("\n".join(found))
    loaded: Tasks = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            new = manager.load([name])
        except Exception as error:  # whatever a task file, its Python functions and `datasets` raise
            raise ValueError(
                f"{field}: {name} cannot be loaded ({first_line(error) or type(error).__name__}); correct its file, or "
                "get its data into the Hugging Face cache where the hub can be reached"
            ) from error
        if twice := loaded["tasks"].keys() & new["tasks"].keys():
            raise ValueError(f"{field}: {min(twice)} is given twice, by itself or in a group; remove one")
        for kind, members in new.items():
            loaded[kind] |= members
    if found := list(_unsuited(loaded["tasks"], max_length, field)):
        raise ValueError("\n".join(found))
    return loaded


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """Return lm-eval's index of tasks: of the folder alone where that is enough, as its own takes many seconds."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=folder, include_defaults=False)
    if all(_is_one_task(Path(name).expanduser()) if is_task_file(name) else name in own.all_subtasks for name in names):
        return own
    return TaskManager(include_path=folder)


def _is_one_task(path: Path) -> bool:
    """Return False for the file of a group, whose tasks may be lm-eval's own."""
    return not path.is_file() or re.search(r"^group:", path.read_text(encoding="utf-8"), re.MULTILINE) is None


def _unknown(names: Sequence[str], known: Sequence[str], field: str, folder_field: str) -> Iterator[str]:
    for name in names:
        if not is_task_file(name):
            if name not in known:
                yield (
                    f"{field}: {name!r} is no task of lm-eval{nearest(name, known)}; `lm-eval ls tasks` lists them, "
                    f"and files of your own are given by their path or with {folder_field}"
                )
        elif not Path(name).expanduser().is_file():
            yield f"{field}: {name} does not exist; correct the path (relative ones start at {Path.cwd()})"


def _unsuited(tasks: dict[str, Any], max_length: int | None, field: str) -> Iterator[str]:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            yield f"{field}: {name} runs code that the network writes; use lm-eval itself on the exported model"
        if getattr(task, "MULTIMODAL", False):
            yield f"{field}: {name} is a task of images or sounds; remove it"
        if max_length is not None and task.OUTPUT_TYPE == "generate_until":
            settings = getattr(task.config, "generation_kwargs", None) or {}
            tokens = settings.get("max_gen_toks", 256)  # lm-eval's own number where a task has none
            if tokens >= max_length:
                yield (
                    f"{field}: {name} generates up to {tokens} tokens, which leaves no room for a prompt in sequences "
                    f"of {max_length}; remove it, or set max_gen_toks in a task file"
                )

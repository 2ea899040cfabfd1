"""Read and check lists of records: of `data.mix` each item is a mapping with keys of its own."""

import dataclasses
import os
import typing
from collections.abc import Iterator

from relora_ds.config import fields, rules, spelling
from relora_ds.config.spelling import Raw


def record_of(kind: object) -> type | None:
    """Return the dataclass of which a field of type `kind` holds a list; None for a field of another type."""
    for option in spelling.options(kind):
        for item in typing.get_args(option):
            if dataclasses.is_dataclass(item):
                return typing.cast(type, item)
    return None


def read(key: str, raw: Raw, record: type) -> tuple[list | None, list[str]]:
    """Return (what is written as a list of records, everything that is wrong with it)."""
    if raw is None:
        return None, []
    if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
        example = f"[{{{', '.join(f'{field.name}: …' for field in dataclasses.fields(record)[:3])}}}, …]"
        return None, [f"{key}: {spelling.show(raw)} is not a list of mappings; use e.g. {example}"]
    found: list = []
    problems: list[str] = []
    for index, item in enumerate(raw):
        one, wrong = _read_one(f"{key}[{index}].", typing.cast(dict, item), record)
        found.append(one)
        problems += wrong
    return found, problems


def problems(tree: object, prefix: str = "") -> Iterator[str]:
    """Yield what is wrong with the values of all records in a tree, as `fields.problems` does of the others."""
    for key in fields.fields_of(type(tree), prefix):
        for inner, record in items(key, fields.value_of(tree, key.removeprefix(prefix))):
            yield from fields.problems(record, inner)


def items(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield (prefix of its keys, record) for each record of a field's value."""
    for index, one in enumerate(value if isinstance(value, list) else ()):
        if dataclasses.is_dataclass(one):
            yield f"{key}[{index}].", one


def _read_one(prefix: str, written: dict[str, Raw], record: type) -> tuple[object, list[str]]:
    known, one, problems = fields.fields_of(record), record(), []
    for name, raw in written.items():
        if name not in known:
            problems.append(f"{prefix}{name}: unknown key{rules.nearest(name, known)}; it can be {', '.join(known)}")
            continue
        if spelling.has_variable(raw):
            problems.append(f"{prefix}{name}: {spelling.show(raw)} holds a ${{…}}; write the value itself")
            continue
        try:
            value = spelling.convert(raw, known[name].kind)
        except ValueError as error:
            problems.append(f"{prefix}{name}: {spelling.show(raw)} {error}; the default is {known[name].default!r}")
            continue
        is_path = known[name].is_path and isinstance(value, str)
        setattr(one, name, os.path.expanduser(typing.cast(str, value)) if is_path else value)
    return one, problems

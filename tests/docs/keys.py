"""The keys of a recipe in Markdown, from its schema."""

import dataclasses
import typing

from relora_ds.config import Recipe


def markdown() -> str:
    """Return a table of the keys of every section, the recipe's own first."""
    sections = [("", Recipe)] + [
        (field.name, field.type) for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(field.type)
    ]
    return "\n\n".join(_section(name, kind) for name, kind in sections)


def names() -> list[str]:
    """Return the dotted names of all keys."""
    found = []
    for field in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(field.type):
            found += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.type)]
        else:
            found.append(field.name)
    return found


def _section(name: str, kind: type) -> str:
    rows = ["| key | type | default |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(field.type):
            key = f"{name}.{field.name}" if name else field.name
            rows.append(f"| `{key}` | {_type(field.type)} | `{_default(field)}` |")
    title = f"## {name}" if name else "## Top level"
    return f"{title}\n\n" + "\n".join(rows)


def _type(kind) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    return f"{kind.__name__ if isinstance(kind, type) else kind}".replace("|", "or").replace("None", "null")


def _default(field: dataclasses.Field) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

"""The keys of a recipe in Markdown, from its schema: types, choices, defaults, and the text under each field."""

import ast
import dataclasses
import inspect
import re
from functools import cache

from relora_ds.config import Recipe, rules, spelling
from relora_ds.config.fields import Field, fields_of
from relora_ds.config.records import record_of

# section -> the page that explains it
EXPLAINED = {
    "": "[Training a recipe](../guides/train.md)",
    "model": "[Models](../guides/models.md)",
    "relora": "[ReLoRA](../concepts/relora.md), [Restart](../concepts/restart.md), [Memory](../guides/memory.md)",
    "lora": "[Methods](../guides/train.md#methods)",
    "cola": "[CoLA](../guides/models.md#cola)",
    "crnet": "[CR-Net](../guides/models.md#cr-net)",
    "fira": "[Methods](../guides/train.md#methods)",
    "apollo": "[Methods](../guides/train.md#methods)",
    "scale": "[Methods](../guides/train.md#methods)",
    "muon": "[Methods](../guides/train.md#methods)",
    "switchlora": "[Methods](../guides/train.md#methods)",
    "sst": "[Sparse Spectral Training](../guides/train.md#sparse-spectral-training)",
    "train": "[Shipped recipes](recipes.md)",
    "optim": "[Phases of a run](../concepts/relora.md#phases-of-a-run), "
    "[Weight decay and clipping](../concepts/restart.md#weight-decay-and-clipping)",
    "data": "[Data](../guides/data.md)",
    "eval": "[Metrics](run_directory.md#eval), [Tasks of lm-eval](../guides/export.md#tasks-of-lm-eval)",
    "checkpoint": "[Resume](../guides/resume.md), [Checkpoints](../concepts/checkpoints.md)",
    "log": "[Metrics, loggers, hooks](../guides/logging.md)",
    "guard": "[Fault tolerance](../guides/faults.md)",
    "islands": "[Islands](../guides/islands.md)",
}


def markdown() -> str:
    """Return a table of the keys of every section, the recipe's own first."""
    sections = [("", Recipe)] + [
        (field.name, field.type) for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(field.type)
    ]
    return "\n\n".join(_section(name, kind) for name, kind in sections)


def names() -> list[str]:
    """Return the dotted names of all keys."""
    return list(fields_of(Recipe))


@cache
def explanations(kind: type) -> dict[str, str]:
    """Return `{name: text under the field}` of a dataclass."""
    (body,) = ast.parse(inspect.getsource(kind)).body
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and is_text:
            found[field.target.id] = inspect.cleandoc(below.value.value)
    return found


def _section(name: str, kind: type) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for field in fields_of(kind, f"{name}." if name else "").values():
        leaf = field.key.removeprefix(f"{name}.")
        if "." not in leaf:
            rows.append(_row(field, leaf, kind))
    title = f"## {name}" if name else "## Top level"
    about = inspect.cleandoc(kind.__doc__).split("\n\nRaises:")[0]
    return "\n\n".join([f"{title}\n\n{about} See {EXPLAINED[name]}.\n\n" + "\n".join(rows), *_items(name, kind)])


def _items(name: str, kind: type) -> list[str]:
    """Return a table for each field that holds a list of records: the keys of an item."""
    found = []
    for field in fields_of(kind, f"{name}." if name else "").values():
        if record := record_of(field.kind):
            rows = ["| key of an item | value | default | meaning |", "|---|---|---|---|"]
            rows += [_row(one, one.key, record) for one in fields_of(record).values()]
            found.append(f"### Items of {field.key}\n\n{inspect.cleandoc(record.__doc__)}\n\n" + "\n".join(rows))
    return found


def _row(field: Field, leaf: str, kind: type) -> str:
    meaning = " ".join(explanations(kind)[leaf].split()).replace("|", "\\|")
    return f"| `{field.key}` | {_value(field)} | `{_default(field.default)}` | {meaning} |"


def _value(field: Field) -> str:
    """Return the type in words, with the choices or the condition."""
    words = spelling.describe(field.kind)
    if field.choices:
        choices = ", ".join(f"`{choice}`" for choice in field.choices)
        words = choices if words == "text" else f"{choices}; {words}"
    for rule in field.rules:
        if isinstance(rule, rules.Integer):
            words = words.replace("an integer", f"an integer from {rule.least}")
        elif isinstance(rule, rules.Number):
            words = re.sub("a number", f"a number {rule.condition}", words)
    return words


def _default(value: object) -> str:
    return (
        spelling.to_yaml([value]).strip().removeprefix("- ")
        if not isinstance(value, list)
        else f"[{', '.join(map(str, value))}]"
    )

"""From YAML and `section.key=value` overrides to a typed recipe, collecting every mistake on the way.

The sources are flattened to {dotted key: what is written there} and merged leaf by leaf: the recipe that a file
`extends` lies under the file, and the overrides lie over it. Then the fields' types decide what the values are, see
`spelling`. Nothing here knows a field by name; what is special about some is in `schema`.
"""

import difflib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from relora_ds.config import records, spelling
from relora_ds.config.fields import fields_of
from relora_ds.config.methods import method_class
from relora_ds.config.names import METHODS
from relora_ds.config.schema import ALIASES, OF_ONE_START, ONE_OF, REMOVED, Recipe
from relora_ds.config.spelling import Raw, Written

SCHEMA = fields_of(Recipe)
SECTIONS = {field.name: fields(field.type)[0].name for field in fields(Recipe) if is_dataclass(field.type)}

# The key that names the recipe below this one, and what is not taken over from it: a run directory is of one run.
EXTENDS = "extends"
NOT_INHERITED = ("run_dir", *OF_ONE_START)

logger = logging.getLogger(__name__)


def read_values(
    path: Path, find: Callable[[str, Path], tuple[Path | None, list[str]]], problems: list[str]
) -> tuple[dict[str, Raw], bool, list[Path]]:
    """Return ({dotted key: value} of a YAML file and the recipes it extends, whether all could be read, the files).

    find: (what a file extends, the file's directory) -> (the extended file or None, [what is wrong]). What could not
    be read is left out, and the reason is in `problems`.
    """
    chain, layers, complete = [path], [], False
    while not complete:
        values = _read_file(chain[-1], problems)
        if values is None:
            break
        parent = values.pop(EXTENDS, None)
        layers.append(values)
        if parent is None:
            complete = True
        elif not isinstance(parent, Written):
            problems.append(
                f"{EXTENDS}: {spelling.show(parent)} in {chain[-1]} is neither a recipe's name nor a "
                f"path; use e.g. {EXTENDS}: quickstart"
            )
            break
        else:
            found, why = find(parent.text, chain[-1].parent)
            problems += [f"{EXTENDS}: {reason}" for reason in why]
            if found is None:
                break
            if found.resolve() in [file.resolve() for file in chain]:
                problems.append(
                    f"{EXTENDS}: {' -> '.join(str(file) for file in [*chain, found])} goes round in a "
                    f"circle; remove one {EXTENDS}"
                )
                break
            chain.append(found)
    merged: dict[str, Raw] = {}
    for values in reversed(layers):
        merged = lay_over({key: value for key, value in merged.items() if key not in NOT_INHERITED}, values)
    return merged, complete, chain


def lay_over(below: dict[str, Raw], above: dict[str, Raw]) -> dict[str, Raw]:
    """Return `below` with the values of `above` over it, leaf by leaf; see `ONE_OF` for the pairs of which one is set.

    A source that sets both of a pair is left as it is: that is a mistake, and the recipe's checks name it.
    """
    merged = {**below, **above}
    for pair in ONE_OF:
        for one, other in (pair, pair[::-1]):
            if above.get(one) is not None and other not in above:
                merged[other] = None
    return merged


def _read_file(path: Path, problems: list[str]) -> dict[str, Raw] | None:
    """Return {dotted key: value} of one YAML file; None, and the reason in `problems`, when it cannot be read."""
    values: dict[str, Raw] = {}
    try:
        root = spelling.compose(path.read_bytes())
        if root is not None:
            _flatten(root, "", values, problems)
    except (ValueError, OSError) as error:
        problems.append(f"{path} is not a readable YAML recipe: {error}")
        return None
    return values


def read_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, Raw]:
    """Return {dotted key: value} of `section.key=value` overrides; later ones win. Malformed ones go to `problems`."""
    values: dict[str, Raw] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = ALIASES.get(key.strip(), key.strip())
        if not equals or not key:
            problems.append(f"override {override!r} is not section.key=value; e.g. relora.r=64")
        elif key == EXTENDS:
            problems.append(f"{EXTENDS}: {text!r} is no override; write it into a recipe file")
        elif key in SECTIONS:
            _refuse_section(key, spelling.of_override(text, None), problems)
        else:
            values[key] = spelling.of_override(text, SCHEMA[key].kind if key in SCHEMA else None)
    return values


def _flatten(tree: yaml.MappingNode, prefix: str, values: dict[str, Raw], problems: list[str]) -> None:
    """Write the leaves of a nested mapping into `values` under their dotted keys. Lists are leaves.

    Raises:
        ValueError: a key is given twice, nested and dotted.
    """
    for key, node in tree.value:
        dotted = ALIASES.get(f"{prefix}{key.value}", f"{prefix}{key.value}")
        if isinstance(node, yaml.MappingNode) and dotted not in SCHEMA:
            _flatten(node, f"{dotted}.", values, problems)
        elif dotted in SECTIONS:
            _refuse_section(dotted, spelling.of_node(node), problems)
        elif dotted in values:
            raise ValueError(f"line {key.start_mark.line + 1}: duplicate key {dotted}; remove one of the two")
        else:
            values[dotted] = spelling.of_node(node)


def _refuse_section(key: str, raw: Raw, problems: list[str]) -> None:
    if raw is not None:  # null: a section with every key commented out
        problems.append(
            f"{key}: {spelling.show(raw)} where a section of keys is expected; "
            f"set its keys instead, e.g. {key}.{SECTIONS[key]}"
        )


def fill_in(values: dict[str, Raw], problems: list[str]) -> tuple[Recipe, set[str]]:
    """Return (the recipe, the keys whose value could not be used).

    The recipe has its defaults, over them what its method's name stands for, and over both `values`.

    Unknown keys and wrong types are appended to `problems`; those fields keep their default.
    """
    recipe, untrusted = Recipe(), set()
    for key, value in _method_defaults(values).items():
        section, _, leaf = key.rpartition(".")
        setattr(getattr(recipe, section) if section else recipe, leaf, value)
    for key, raw in values.items():
        if key in REMOVED:
            if spelling.show(raw) != REMOVED[key]:
                logger.warning("%s: %s is a key of an earlier version and has no effect", key, spelling.show(raw))
            continue
        if key not in SCHEMA:
            guess = _nearest_key(key)
            problems.append(f"{key}: unknown key; " + (f"did you mean {guess}?" if guess else "remove it"))
            if guess not in values:
                untrusted.add(guess or key)  # that the guessed key is not set is no second mistake
            continue
        if spelling.has_variable(raw):
            untrusted.add(key)
            problems.append(
                f"{key}: {spelling.show(raw)} holds a ${{…}}, and recipes resolve no variables; write "
                f'the value itself, or let the shell insert it: {key}="$NAME" on the command line'
            )
            continue
        if raw is None and "none" in SCHEMA[key].choices:  # null means the same
            raw = Written("none")
        section, _, leaf = key.rpartition(".")
        part = getattr(recipe, section) if section else recipe
        if record := records.record_of(SCHEMA[key].kind):
            value, found = records.read(key, raw, record)
            setattr(part, leaf, value)
            problems += found
            untrusted |= {key} if found else set()
            continue
        try:
            value = spelling.convert(raw, SCHEMA[key].kind)
        except ValueError as error:
            untrusted.add(key)
            problems.append(f"{key}: {spelling.show(raw)} {error}; the default is {_show(getattr(part, leaf))}")
        else:
            setattr(part, leaf, os.path.expanduser(value) if SCHEMA[key].is_path and isinstance(value, str) else value)
    return recipe, untrusted


def _method_defaults(values: dict[str, Raw]) -> Mapping[str, Any]:
    """Return the values that the method's name stands for, which lie under what the sources set."""
    method = values.get("method")
    return method_class(method.text).defaults if isinstance(method, Written) and method.text in METHODS else {}


def _nearest_key(key: str) -> str | None:
    """Return the known key that `key` most likely means: the right leaf in a wrong section, or a typing error."""
    leaf = key.rpartition(".")[2]
    same_leaf = [known for known in SCHEMA if known.rpartition(".")[2] == leaf]
    if len(same_leaf) == 1:
        return same_leaf[0]
    found = difflib.get_close_matches(key, same_leaf or SCHEMA, n=1, cutoff=0.7)
    if not found:  # a typing error in the leaf, and the section forgotten
        by_leaf = {known.rpartition(".")[2]: known for known in reversed(SCHEMA)}  # `relora` before other methods'
        found = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    return found[0] if found else None


def _show(value) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    )

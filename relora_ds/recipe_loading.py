"""From YAML and `section.key=value` overrides to a typed recipe, collecting every mistake on the way.

OmegaConf knows the types and stops at the first error; a user wants to see all of them. So the sources are flattened
to {dotted key: value} and merged leaf by leaf: the recipe that a file `extends` lies under the file, and the overrides
lie over it. The recipe class comes in as an argument: nothing here knows a field by name, except those listed below.
"""

import difflib
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Where the text "none" is a choice, YAML's null means the same.
NONE_IS_A_CHOICE = ("activation_checkpointing", "relora.optimizer_reset", "relora.frozen_master", "lora.base")

# A recipe sets one of each pair. A source that sets one of them replaces the other one of the sources below it:
# `train.tokens=1e9` is all it takes to run a recipe of so many steps by tokens.
ONE_OF = (("train.steps", "train.tokens"), ("train.batch_sequences", "train.batch_tokens"),
          ("model.preset", "model.name_or_path"))

# How one start treats the run directory. A recipe that is stored or extended must not repeat it: `overwrite` would
# delete the very run that stored it.
OF_ONE_START = ("resume", "overwrite")

# The key that names the recipe below this one, and what is not taken over from it: a run directory is of one run.
EXTENDS = "extends"
NOT_INHERITED = ("run_dir", *OF_ONE_START)

# A field's type in a user's words.
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null",
          list[str]: "a list of names", list[float]: "a list of numbers"}


def read_values(path: Path, recipe_class: type, find: Callable[[str, Path], tuple[Path | None, list[str]]],
                problems: list[str]) -> tuple[dict[str, object], bool, list[Path]]:
    """({dotted key: value} of a YAML file laid over those of the recipes it extends, whether all could be read, the
    files).

    find: (what a file extends, the file's directory) -> (the extended file or None, [what is wrong]). What could not
    be read is left out, and the reason is in `problems`.
    """
    chain, layers, complete = [path], [], False
    while not complete:
        values = _read_file(chain[-1], recipe_class, problems)
        if values is None:
            break
        parent = values.pop(EXTENDS, None)
        layers.append(values)
        if parent is None:
            complete = True
        elif not isinstance(parent, str):
            problems.append(f"{EXTENDS}: {parent!r} in {chain[-1]} is neither a recipe's name nor a path; use e.g. "
                            f"{EXTENDS}: quickstart")
            break
        else:
            found, why = find(parent, chain[-1].parent)
            problems += [f"{EXTENDS}: {reason}" for reason in why]
            if found is None:
                break
            if found.resolve() in [file.resolve() for file in chain]:
                problems.append(f"{EXTENDS}: {' -> '.join(str(file) for file in [*chain, found])} goes round in a "
                                f"circle; remove one {EXTENDS}")
                break
            chain.append(found)
    merged = {}
    for values in reversed(layers):
        merged = lay_over({key: value for key, value in merged.items() if key not in NOT_INHERITED}, values)
    return merged, complete, chain


def lay_over(below: dict[str, object], above: dict[str, object]) -> dict[str, object]:
    """`below` with the values of `above` over it, leaf by leaf; see `ONE_OF` for the pairs of which one is set.

    A source that sets both of a pair is left as it is: that is a mistake, and the recipe's checks name it.
    """
    merged = {**below, **above}
    for pair in ONE_OF:
        for one, other in (pair, pair[::-1]):
            if above.get(one) is not None and other not in above:
                merged[other] = None
    return merged


def _read_file(path: Path, recipe_class: type, problems: list[str]) -> dict[str, object] | None:
    """{dotted key: value} of one YAML file; None, and the reason in `problems`, when it cannot be read."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(tree, dict):
            raise ValueError("it holds a list, not a mapping of keys to values")
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        problems.append(f"{path} is not a readable YAML recipe: {error}")
        return None
    values = {}
    _flatten(tree, "", recipe_class, values, problems)
    return values


def read_overrides(overrides: Sequence[str], recipe_class: type, problems: list[str]) -> dict[str, object]:
    """{dotted key: value} of `section.key=value` overrides; later ones win. Malformed ones go to `problems`."""
    values = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        try:
            if not equals or not key.strip():
                raise ValueError("no key=value")
            tree = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError):
            problems.append(f"override {override!r} is not section.key=value with a YAML value; e.g. relora.r=64")
        else:
            _flatten(tree, "", recipe_class, values, problems)
    if EXTENDS in values:
        problems.append(f"{EXTENDS}: {values.pop(EXTENDS)!r} is no override; write it into a recipe file")
    return values


def _flatten(tree: dict, prefix: str, recipe_class: type, values: dict, problems: list[str]) -> None:
    """Write the leaves of a nested mapping into `values` under their dotted keys. Lists are leaves."""
    sections = {f.name: fields(f.type)[0].name for f in fields(recipe_class) if is_dataclass(f.type)}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            _flatten(value, f"{dotted}.", recipe_class, values, problems)
        elif dotted not in sections:
            values[dotted] = value
        elif value is not None:  # null: a section with every key commented out
            problems.append(f"{dotted}: {value!r} where a section of keys is expected; "
                            f"set its keys instead, e.g. {dotted}.{sections[dotted]}")


def fill_in(recipe_class: type, values: dict[str, object], problems: list[str]) -> tuple[object, set[str]]:
    """(the recipe: its defaults with `values` over them, the keys whose value could not be used).

    Unknown keys and wrong types are appended to `problems`; those fields keep their default.
    """
    schema, config, untrusted = _schema(recipe_class), OmegaConf.structured(recipe_class), set()
    for key, value in values.items():
        if key not in schema:
            guess = _nearest_key(key, schema)
            problems.append(f"{key}: unknown key; " + (f"did you mean {guess}?" if guess else "remove it"))
            if guess not in values:
                untrusted.add(guess or key)  # that the guessed key is not set is no second mistake
            continue
        if value is None and key in NONE_IS_A_CHOICE:
            value = "none"
        accepted = typing.get_args(schema[key]) or (schema[key],)
        if int in accepted and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1.2e9 is a float in YAML, and how people write token counts
        elif float in accepted and type(value) is int:
            value = float(value)  # OmegaConf does not, where text is accepted too
        default = OmegaConf.select(config, key)
        try:
            OmegaConf.update(config, key, value)
            OmegaConf.select(config, key, throw_on_missing=True)  # also resolves ${…}
        except (OmegaConfBaseException, ValueError):
            OmegaConf.update(config, key, default)
            untrusted.add(key)
            problems.append(f"{key}: {_show(value)} is not {_describe(schema[key])}; the default is {_show(default)}")
    return OmegaConf.to_object(config), untrusted


def _schema(recipe_class: type) -> dict[str, object]:
    """{dotted key: type} of all fields."""
    schema = {}
    for top in fields(recipe_class):
        if is_dataclass(top.type):
            schema |= {f"{top.name}.{f.name}": f.type for f in fields(top.type)}
        else:
            schema[top.name] = top.type
    return schema


def _nearest_key(key: str, schema: dict[str, object]) -> str | None:
    """The known dotted key that `key` most likely means: the right leaf in a wrong section, or a typing error."""
    leaf = key.rpartition(".")[2]
    same_leaf = [known for known in schema if known.rpartition(".")[2] == leaf]
    if len(same_leaf) == 1:
        return same_leaf[0]
    found = difflib.get_close_matches(key, same_leaf or schema, n=1, cutoff=0.7)
    if not found:  # a typing error in the leaf, and the section forgotten
        by_leaf = {known.rpartition(".")[2]: known for known in schema}
        found = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    return found[0] if found else None


def _describe(kind) -> str:
    return _WORDS.get(kind) or " or ".join(_WORDS[option] for option in typing.get_args(kind))


def _show(value) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) \
        else repr(value)

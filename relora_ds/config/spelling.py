"""What is written in a recipe, and the value that a field makes of it.

YAML decides by its spelling what a plain word is: to its version 1.1 `0123` is 83, `2024_01_02` an integer, `no` false
and `1:30` 90. Here the type of the field decides. A text field holds the characters that were written; a number is
read as a decimal number. Nothing is resolved: no variables, no tags that build Python objects.

`Written` is a scalar as it was written, `list` a list of scalars or of records, `dict` one record, `None` is null; a
`Nested` is none of these.
"""

import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from types import NoneType

import yaml

# A field's type in a user's words.
_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    list[str]: "a list of names",
    list[float]: "a list of numbers",
}
_NULL = ("", "null", "Null", "NULL", "~")
_BOOL = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_DIGITS = re.compile(r"[+-]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?\.?(inf|nan)", re.IGNORECASE)
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "seq", "map")
}
_MERGE = "tag:yaml.org,2002:merge"
_MAX_DIGITS = 400  # of an integer in exponent notation; 1e999999999 would need a gigabyte


@dataclass(frozen=True)
class Written:
    """A scalar: its text without the quotes, and whether it was quoted (quoted text is no number and not null)."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Nested:
    """Something that no field can hold. what: a description of it."""

    what: str


Raw = Written | Nested | list | dict | None


def compose(content: bytes | str) -> yaml.MappingNode | None:
    """Parse YAML without building any object from it; None for an empty document.

    Raises:
        ValueError: invalid YAML, a tag such as !!python/object, a merge key, a key that is given twice, or something
            else than a mapping. The message lists every one of them.
    """
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if root is None:
        return None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("it holds a list or a word, not a mapping of keys to values")
    if found := _structural_problems(root):
        raise ValueError("; ".join(found))
    return root


def _structural_problems(root: yaml.Node) -> list[str]:
    """Return what is valid YAML and no recipe; [] also means that the nodes form a tree, apart from shared scalars."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        node = waiting.pop()
        line = f"line {node.start_mark.line + 1}"
        if node.tag not in _PLAIN_TAGS:
            found.append(f"{line}: the tag {node.tag} is not read; remove it")
        if isinstance(node, yaml.ScalarNode):
            continue
        if id(node) in seen:  # aliases of aliases multiply
            found.append(f"{line}: an alias stands for a list or a mapping; write that out")
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            found += _key_problems(node)
            waiting += [value for _, value in node.value]
        else:
            waiting += node.value
    return found


def _key_problems(node: yaml.MappingNode) -> list[str]:
    found, keys = [], set()
    for key, _ in node.value:
        line = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            found.append(f"{line}: a key is a list or a mapping; use a word")
        elif key.tag == _MERGE:
            found.append(f"{line}: the merge key << is not read; use extends, or write the keys")
        elif key.value in keys:
            found.append(f"{line}: duplicate key {key.value}; remove one of the two")
        else:
            keys.add(key.value)
    return found


def of_node(node: yaml.Node) -> Raw:
    """Return what a node of a parsed file says, before the field's type is known."""
    if isinstance(node, yaml.ScalarNode):
        quoted = node.style is not None
        return None if not quoted and node.value in _NULL else Written(node.value, quoted)
    if isinstance(node, yaml.SequenceNode):
        return [_of_item(item) for item in node.value]
    return Nested("a mapping")


def _of_item(node: yaml.Node) -> Raw:
    if isinstance(node, yaml.ScalarNode):
        return Written(node.value, node.style is not None)
    if isinstance(node, yaml.MappingNode):
        return {key.value: of_node(value) for key, value in node.value}
    return Nested("a list")


def of_override(text: str, kind: object) -> Raw:
    """Return what the value of a `key=value` override says; kind: the field's type, None where there is no such field.

    All of `text` is the value. Quotes around all of it are YAML's, and a list is YAML's flow style, `[a, b]`.
    """
    if text in _NULL:
        return None
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_quoted or (text.lstrip().startswith("[") and any(typing.get_origin(o) is list for o in options(kind))):
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError):
            return Written(text)
        whole = (
            node is not None and node.end_mark is not None and node.end_mark.index == len(text.rstrip())
        )  # else a comment follows
        if whole and isinstance(node, yaml.SequenceNode) and not _structural_problems(node):
            return of_node(node)
        if whole and isinstance(node, yaml.ScalarNode) and node.style in ("'", '"'):
            return Written(node.value, quoted=True)
    return Written(text)


def options(kind: object) -> tuple:
    """Return the plain types of which a value may be: those of a union, `str` for a `Literal`, no rules."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return options(typing.get_args(kind)[0])
    if origin is typing.Literal:
        return (str,)
    if origin is list:
        (item,) = typing.get_args(kind)
        return (list[options(item)[0]],)  # type: ignore[misc]  # a type made of a value
    if origin in (typing.Union, types.UnionType):
        return tuple(dict.fromkeys(plain for one in typing.get_args(kind) for plain in options(one)))
    return (kind,)


def choices(kind: object) -> tuple[str, ...]:
    """Return the texts that a type lists in a `Literal`, also as the items of a list; () without one."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    return tuple(text for one in typing.get_args(kind) for text in choices(one))


def closed_choices(kind: object) -> tuple[str, ...]:
    """Return `choices`, or () where the type takes other texts too."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return () if str in parts else choices(kind)


def convert(raw: Raw, kind: object) -> object:
    """Return the value of type `kind`, such as `str | None`.

    Raises:
        ValueError: it is none; the message follows the value in a sentence.
    """
    wanted = options(kind)
    if isinstance(raw, Written) and str in wanted and (raw.quoted or "_" in raw.text):
        wanted = (str,)
    for option, reader in _READERS.items():  # text last: it takes whatever the others leave
        if option in wanted:
            try:
                return reader(raw)
            except (ValueError, OverflowError):
                pass
    raise ValueError(f"is not {describe(kind)}")


def has_variable(raw: Raw) -> bool:
    """Return True if `${`, which starts a variable in other tools' recipes, is somewhere in a value."""
    items = raw if isinstance(raw, list) else [raw]  # records look at their own values
    return any(isinstance(item, Written) and "${" in item.text for item in items)


def describe(kind: object) -> str:
    """Return a field's type in words."""
    return " or ".join(_WORDS.get(option, "a list of mappings") for option in options(kind))


def show(raw: Raw) -> str:
    """Return a value as an error message shows it: numbers, true, false and null bare, text in quotes."""
    if isinstance(raw, list):
        return f"[{', '.join(map(show, raw))}]"
    if isinstance(raw, Nested):
        return raw.what
    if isinstance(raw, dict):
        return "a mapping"
    if raw is None:
        return "null"
    is_bare = not raw.quoted and (_DIGITS.fullmatch(raw.text) or raw.text in ("true", "false"))
    return raw.text if is_bare else repr(raw.text)


def to_yaml(values: dict) -> str:
    """Return nested values of the types above as YAML that reads back as the same ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML leaves some spellings of a number unquoted, such as 1e3.
    style = "'" if _DIGITS.fullmatch(text) or _NOT_FINITE.fullmatch(text) or text.lower() in _BOOL else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _text_of(raw: Raw) -> str:
    if not isinstance(raw, Written):
        raise ValueError("not a scalar")
    return raw.text


def _null(raw: Raw) -> None:
    if raw is not None:
        raise ValueError("not null")


def _bool(raw: Raw) -> bool:
    word = _text_of(raw).strip().lower()
    if word not in _BOOL:
        raise ValueError("no truth value")
    return _BOOL[word]


def _int(raw: Raw) -> int:
    text = _text_of(raw).strip()
    if re.fullmatch(r"[+-]?0[xX][0-9a-fA-F]+", text):
        return int(text, 16)
    if not _DIGITS.fullmatch(text):
        raise ValueError("not a number")
    try:
        number = Decimal(text)  # exact, where a float of 1e23 is not
    except InvalidOperation as error:
        raise ValueError("not a number") from error
    if number.adjusted() > _MAX_DIGITS or number != number.to_integral_value():
        raise ValueError("not an integer")
    return int(number)


def _float(raw: Raw) -> float:
    text = _text_of(raw).strip()
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if not _DIGITS.fullmatch(text):
        raise ValueError("not a number")
    return float(text)


def _list_of(reader: Callable[[Raw], object]) -> Callable[[Raw], list]:
    def read(raw: Raw) -> list:
        if not isinstance(raw, list):
            raise ValueError("not a list")
        return [reader(item) for item in raw]

    return read


_READERS: dict[object, Callable[[Raw], object]] = {
    NoneType: _null,
    bool: _bool,
    int: _int,
    float: _float,
    list[float]: _list_of(_float),
    list[str]: _list_of(_text_of),
    str: _text_of,
}

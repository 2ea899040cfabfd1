"""The fields of a dataclass tree by dotted key, with their types and rules, and the check of their values."""

import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType

from relora_ds.config import rules, spelling


@dataclass(frozen=True)
class Field:
    """One key of a recipe.

    Attributes:
        key: with its section, such as "relora.r".
        kind: its type, without the rules.
        rules: what its value must fulfil beside its type, see `rules`.
    """

    key: str
    kind: object
    rules: tuple
    default: object

    @property
    def options(self) -> tuple:
        """The plain types that a value may have."""
        return spelling.options(self.kind)

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts that are allowed; () where any is, or none."""
        listed = [tuple(rule.names()) for rule in self.rules if isinstance(rule, rules.OneOf)]
        return listed[0] if listed else spelling.choices(self.kind)

    @property
    def is_path(self) -> bool:
        """Whether it holds a path, or may hold one."""
        return any(isinstance(rule, rules.FilePath) for rule in self.rules)

    def problem(self, value: object) -> str | None:
        """Return what is wrong with a value, or None."""
        name = self.key
        if value is None and NoneType in self.options:
            return None
        if isinstance(value, str) and str in self.options and (listed := spelling.closed_choices(self.kind)):
            return rules.choice(name, value, ("true", "false", *listed) if bool in self.options else listed)
        if isinstance(value, list) and (listed := spelling.choices(self.kind)):
            return next((found for one in value if (found := rules.choice(name, one, listed))), None)
        own = [rule for rule in self.rules if isinstance(rule, (rules.Integer, rules.Number, rules.Names, rules.OneOf))]
        if own and not (isinstance(value, str) and str in self.options and isinstance(own[0], rules.Number)):
            return own[0].problem(name, value, self.default)
        if any(_is_a(value, option) for option in self.options):
            return None
        return f"{name}: {value!r} is not {spelling.describe(self.kind)}; use e.g. {self.default!r}"


def fields_of(tree: type, prefix: str = "") -> dict[str, Field]:
    """Return `{dotted key: field}` of a dataclass and of the dataclasses in it."""
    found: dict[str, Field] = {}
    for field in fields(tree):
        key = prefix + field.name
        if isinstance(field.type, type) and is_dataclass(field.type):
            found |= fields_of(field.type, f"{key}.")
            continue
        is_annotated = typing.get_origin(field.type) is typing.Annotated
        kind, *given = typing.get_args(field.type) if is_annotated else (field.type,)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found[key] = Field(key, kind, tuple(given), default)
    return found


def value_of(tree: object, key: str) -> typing.Any:
    """Return the value of a dotted key."""
    for name in key.split("."):
        tree = getattr(tree, name)
    return tree


def problems(tree: object, prefix: str = "") -> Iterator[str]:
    """Yield a message for each value that its own field does not take. prefix: of the keys in messages."""
    for key, field in fields_of(type(tree), prefix).items():
        if found := field.problem(value_of(tree, key.removeprefix(prefix))):
            yield found


def _is_a(value: object, option: object) -> bool:
    if typing.get_origin(option) is list:
        (item,) = typing.get_args(option)
        return isinstance(value, (list, tuple, set)) and all(_is_a(one, item) for one in value)
    if option in (int, float):
        return rules.is_number(value) if option is float else rules.is_int(value)
    return isinstance(value, option)  # type: ignore[arg-type]  # `options` leaves only classes

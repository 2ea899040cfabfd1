"""What a single value must be. A problem is one line: `<field>: <value> <what is wrong>; <remedy>`.

The rules stand in the schema, beside the type of a field: `Annotated[int, Integer(1)]`.
"""

import difflib
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

MAX_COUNT = 10**9  # steps, sequences, seconds
MAX_TOKENS = 10**15
# Numbers are computed with in fp32 or less: beyond these they would be inf, or 0.
MAX_NUMBER, MIN_NUMBER = 1e9, 1e-30
CONDITIONS: Mapping[str, Callable[[float], bool]] = {
    "above 0": lambda x: x > 0,
    "0 or more": lambda x: x >= 0,
    "0 (no clipping) or more": lambda x: x >= 0,
    "inside (0, 1)": lambda x: 0 < x < 1,
    "inside [0, 1)": lambda x: 0 <= x < 1,
    "inside [0, 1]": lambda x: 0 <= x <= 1,
}


@dataclass(frozen=True)
class Integer:
    """An integer in [least, most].

    Attributes:
        example: a value for the remedy; None = the field's default.
    """

    least: int
    most: int = MAX_COUNT
    example: int | None = None

    def problem(self, name: str, value: object, default: object) -> str | None:
        """Return what is wrong with `value`, or None."""
        example = default if self.example is None else self.example
        if not is_int(value) or value < self.least:
            shown = value if is_int(value) else repr(value)
            return f"{name}: {_short(shown)} is not an integer of at least {self.least}; use e.g. {example}"
        return (
            None if value <= self.most else f"{name}: {_short(value)} is above {_short(self.most)}; use e.g. {example}"
        )


@dataclass(frozen=True)
class Number:
    """A number that fp32 can hold and for which one of `CONDITIONS` holds.

    Attributes:
        example: a value for the remedy; None = the field's default.
    """

    condition: str
    example: float | None = None

    def problem(self, name: str, value: object, default: object) -> str | None:
        """Return what is wrong with `value`, or None."""
        example = default if self.example is None else self.example
        if not is_number(value):
            return f"{name}: {value!r} is not a number {self.condition}; use e.g. {example}"
        if (is_int(value) or math.isfinite(value)) and CONDITIONS[self.condition](value):
            if abs(value) > MAX_NUMBER:
                return f"{name}: {_short(value)} is above {MAX_NUMBER:g}; use e.g. {example}"
            if 0 < abs(value) < MIN_NUMBER:
                return f"{name}: {value} is so small that it would count as 0; use e.g. {example}"
            return None
        if self.condition.startswith("inside"):
            return f"{name}: {_short(value)} is outside {self.condition.removeprefix('inside ')}; use e.g. {example}"
        return f"{name}: {_short(value)} is not a number {self.condition}; use e.g. {example}"


@dataclass(frozen=True)
class Names:
    """A list of names, none of them twice.

    Attributes:
        example: for the remedy.
        expression: whether a regular expression is taken too, as by PEFT.
    """

    example: str
    expression: bool = False

    def problem(self, name: str, value: object, default: object) -> str | None:
        """Return what is wrong with `value`, or None."""
        if self.expression and is_expression(value):
            return None
        if not isinstance(value, (list, tuple, set)) or not all(isinstance(one, str) for one in value):
            wanted = "neither a list of names nor a regular expression" if self.expression else "not a list of names"
            return f"{name}: {value!r} is {wanted}; use e.g. {self.example}"
        twice = sorted({one for one in value if list(value).count(one) > 1})
        return f"{name}: {', '.join(twice)} is given twice; remove one" if twice else None


@dataclass(frozen=True)
class OneOf:
    """One of a list of names that is known only when the recipe is read.

    Attributes:
        names: gives them.
    """

    names: Callable[[], Iterable[str]]

    def problem(self, name: str, value: object, default: object) -> str | None:
        """Return what is wrong with `value`, or None."""
        return choice(name, value, tuple(self.names()))


class FilePath:
    """Mark a field that holds a path, or may hold one: `~` is the home directory."""


def nearest_multiples(value: int, step: int) -> list[int]:
    """Return the positive multiples of `step` on both sides of `value`, smaller first."""
    below = value // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def nearest(word: object, known: Iterable[str]) -> str:
    """Return ' (did you mean …?)', or '' when nothing known is near."""
    found = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def mentions(message: str, key: str) -> bool:
    """Return True if the message is about `key`."""
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", message) is not None


def choice(name: str, value: object, known: tuple[str, ...]) -> str | None:
    """Return what is wrong with a value that is none of `known`, or None."""
    if value in known:
        return None
    return f"{name}: {value!r} is unknown{nearest(value, known)}; known: {', '.join(known)}"


def is_int(value: object) -> typing.TypeGuard[int]:
    """Return True for an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> typing.TypeGuard[float]:
    """Return True for an integer or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_expression(value: object) -> bool:
    """Return True for a regular expression, which PEFT takes for module names; "all-linear" is one by its form."""
    if not isinstance(value, str) or any(character.isspace() for character in value):  # a list that is misspelled
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def tenth(steps: int) -> int:
    """Return a sensible warm-up for `steps` steps: a tenth of them, and fewer than them."""
    return min(steps - 1, max(1, steps // 10))


def either(name: str, values: list[int]) -> str:
    """Return `name=value or name=value …`."""
    return " or ".join(f"{name}={value}" for value in values)


def _short(value: object) -> str:
    """Return a value as text, long integers with an exponent."""
    return f"{Decimal(value).normalize():.6}" if is_int(value) and abs(value) >= 10**25 else str(value)

"""Checks of single values: each returns None, or a message `<field>: <value> <what is wrong>; <remedy>`."""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from decimal import Decimal

MAX_COUNT = 10**9  # steps, sequences, seconds
MAX_TOKENS = 10**15
# Numbers are computed with in fp32 or less: beyond these they would be inf, or 0.
MAX_NUMBER, MIN_NUMBER = 1e9, 1e-30


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
    if value in known:
        return None
    return f"{name}: {value!r} is unknown{nearest(value, known)}; known: {', '.join(known)}"


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_names(value: object, empty: bool = False) -> bool:
    return (
        isinstance(value, (list, tuple, set))
        and all(isinstance(name, str) for name in value)
        and (empty or len(value) > 0)
    )


def integer(
    name: str, value: object, least: int, example: int, optional: bool = False, most: int = MAX_COUNT
) -> str | None:
    """Check that `value` is an integer in [least, most]."""
    if value is None and optional:
        return None
    if not is_int(value) or value < least:
        shown = value if is_int(value) else repr(value)
        return f"{name}: {_short(shown)} is not an integer of at least {least}; use e.g. {example}"
    return None if value <= most else f"{name}: {_short(value)} is above {_short(most)}; use e.g. {example}"


def number(name: str, value: object, wanted: str, accepts: Callable[[float], bool], example: float) -> str | None:
    """Check a number that fp32 can hold.

    Args:
        wanted: the condition in words, such as "inside [0, 1)".
        accepts: the same condition, for finite numbers.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and accepts(value):
        if abs(value) > MAX_NUMBER:
            return f"{name}: {_short(value)} is above {MAX_NUMBER:g}; use e.g. {example}"
        if 0 < abs(value) < MIN_NUMBER:
            return f"{name}: {value} is so small that it would count as 0; use e.g. {example}"
        return None
    if wanted.startswith("inside") and is_number:
        return f"{name}: {_short(value)} is outside {wanted.removeprefix('inside ')}; use e.g. {example}"
    return f"{name}: {_short(value) if is_number else repr(value)} is not a number {wanted}; use e.g. {example}"


def _short(value: object) -> str:
    """Return a value as text, long integers with an exponent."""
    return f"{Decimal(value).normalize():.6}" if is_int(value) and abs(value) >= 10**25 else str(value)


def tenth(steps: int) -> int:
    """Return a sensible warm-up for `steps` steps: a tenth of them, and fewer than them."""
    return min(steps - 1, max(1, steps // 10))


def either(name: str, values: list[int]) -> str:
    return " or ".join(f"{name}={value}" for value in values)

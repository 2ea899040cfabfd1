"""Numbers as a sentence has them."""

from collections.abc import Iterable

WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
FRACTIONS = {1 / 2: "half", 1 / 3: "a third", 1 / 4: "a quarter", 1 / 5: "a fifth", 1 / 10: "a tenth"}


def fraction(part: float) -> str:
    """The fraction that is nearest, to a tenth of it."""
    nearest = min(FRACTIONS, key=lambda one: abs(one - part))
    assert abs(nearest - part) < nearest / 10, part
    return FRACTIONS[nearest]


def listed(values: Iterable[float], digits: int) -> str:
    """`0.5, −0.1 and 0.2`."""
    *rest, last = (f"{value:.{digits}f}".replace("-", "−") for value in values)
    return f"{', '.join(rest)} and {last}"


def between(values: Iterable[float], digits: int, unit: str = "") -> str:
    """`0.1 to 0.5`."""
    values = sorted(values)
    return f"{values[0]:.{digits}f}{unit} to {values[-1]:.{digits}f}{unit}"


def with_each_seed(gaps: list[float]) -> str:
    """`with each of three seeds`, if all gaps have the same sign."""
    assert min(gaps) > 0 or max(gaps) < 0, gaps
    return f"with each of {WORDS[len(gaps)]} seeds"

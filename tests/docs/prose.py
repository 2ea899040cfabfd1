"""Sentences of the pages of results, and the numbers in them.

A claim is a part of a sentence as it stands on a page. It is written as an f-string whose numbers are computed from the
files of results, so that it is on the page only while the page has the same numbers, rounded as it prints them.
"""

import re

_GENERATED = re.compile(r"^<!-- ([\w ]+) -->\n.*?^<!-- end of \1 -->$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_NOT_PROSE = re.compile(r"^(\||!\[).*$", re.MULTILINE)  # tables, pictures
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+(?!\.?\d)| ?%)")  # decimals and percentages, not versions
_OF_A_PATTERN = re.compile(r"\d[\d,]*(?:\\\.\d+)?")  # a number in what `re.escape` returns
_ANY = r"\\d[\\d,]*(?:\\.\\d+)?"


def sections(page: str) -> dict[str, str]:
    """Return the prose under each heading of a page in one line, without tables, code and generated blocks."""
    for other in (_GENERATED, _FENCED, _NOT_PROSE):
        page = other.sub("", page)
    _, *found = _HEADING.split(page)
    return {heading: " ".join(text.split()) for heading, text in zip(found[::2], found[1::2], strict=True)}


def problems(text: str, claims: list[str]) -> list[str]:
    """Return the claims that are not in the text, and its numbers that are in no claim."""
    wrong, covered = [], set()
    for claim in claims:
        exact, other = _find(re.escape(claim), text), _find(_OF_A_PATTERN.sub(_ANY, re.escape(claim)), text)
        if exact is None:
            wrong.append(f"measured: {claim!r}; the page: {other and other[0]!r}")
        if found := exact or other:
            covered.update(range(*found.span()))
    return wrong + [
        f"no claim for {number[0]} in {text[max(0, number.start() - 40) : number.end() + 40]!r}"
        for number in NUMBER.finditer(text)
        if not covered.issuperset(range(*number.span()))
    ]


def _find(pattern: str, text: str) -> re.Match | None:
    """Find a pattern; a number at its end is not a part of a longer one."""
    return re.search(rf"(?<![\d.,]){pattern}(?!\d|[.,]\d)", text)

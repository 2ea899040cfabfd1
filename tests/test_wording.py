"""The rules of wording in CONTRIBUTING.md that a search can hold."""

import ast
import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

FRAGMENT = re.compile(r"(Whether|Why|Where|How|Which|What|Who|Of|In|On|As|For|From|With|Whose)\b")
RIDDLES = re.compile(
    r"\b(go(es|ing)? on|the switch|forward's copy|cables?|contenders?|whoever|the house)\b", re.IGNORECASE
)
SOURCES = sorted((ROOT / "relora_ds").rglob("*.py"))
TEXTS = [
    *SOURCES,
    *sorted((ROOT / "relora_ds/recipes").glob("*.yaml")),
    *sorted((ROOT / "relora_ds/lab/experiments/suites").glob("*.yaml")),
    *sorted(DOCS.rglob("*.md")),
    *(
        path
        for folder in ("examples", "launch_scripts")
        for path in sorted((ROOT / folder).iterdir())
        if path.is_file()
    ),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "train.py")),
]


def fragments(path: Path) -> list[str]:
    """Return the functions whose docstring does not begin with a verb; a property's may name what it is."""
    functions = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    return [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for function in functions
        if FRAGMENT.match(ast.get_docstring(function) or "")
        and not any("property" in ast.unparse(one) for one in function.decorator_list)
    ]


def test_docstrings_begin_with_a_verb():
    assert [one for path in SOURCES for one in fragments(path)] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_terms_of_the_trade_are_used(path):
    """Resume, phase transition, model weights, link, baseline."""
    assert [one.group() for one in RIDDLES.finditer(path.read_text(encoding="utf-8"))] == []

"""Only a method's own file knows it by name; everybody else asks the method."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from relora_ds.config import METHODS, load_recipe, method_of
from relora_ds.config.methods import method_class

REPOSITORY = Path(__file__).parent.parent.parent
HOMES = {location.partition(":")[0] for location in METHODS.values()}
CLASSES = {location.partition(":")[2] for location in METHODS.values()}


def knows(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, code) of each place that tells methods apart by name or by class."""
    for node in ast.walk(ast.parse(source)):
        is_told_apart = (
            (isinstance(node, ast.Compare) and _compares_a_method([node.left, *node.comparators]))
            or (isinstance(node, ast.Match) and _compares_a_method([node.subject, *_patterns(node)]))
            or (isinstance(node, ast.Subscript) and _compares_a_method([node.value, node.slice]))
            or (isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and _is_class(node.args[-1]))
            or (isinstance(node, ast.ImportFrom) and node.module in HOMES)
        )
        if is_told_apart:
            yield node.lineno, ast.unparse(node).splitlines()[0]


def _patterns(node: ast.Match) -> list[ast.AST]:
    return [inner.value for case in node.cases for inner in ast.walk(case.pattern) if isinstance(inner, ast.MatchValue)]


def _compares_a_method(parts: list[ast.AST]) -> bool:
    inner = [node for part in parts for node in ast.walk(part)]
    texts = {node.value for node in inner if isinstance(node, ast.Constant)}
    words = [getattr(node, "id", getattr(node, "attr", "")) for node in inner]
    return bool(texts & METHODS.keys()) and any("method" in word.lower() for word in words)


def _is_class(node: ast.AST) -> bool:
    return any(getattr(inner, "id", getattr(inner, "attr", None)) in CLASSES for inner in ast.walk(node))


def test_no_other_file_knows_a_method():
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {code}"
        for path in sorted((REPOSITORY / "relora_ds").rglob("*.py"))
        if path.parent.name != "methods"
        for line, code in knows(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "if recipe.method == 'relora': pass",
        "low_rank = recipe.method in ('lora', 'relora')",
        "x = {'full': 1}[method]",
        "y = methods['control']",
        "match recipe.method:\n    case 'lora': pass",
        "from relora_ds.methods.full import Full",
        "isinstance(phase.method, methods.ReLoRA)",
    ],
)
def test_a_place_that_knows_a_method_is_found(code):
    assert len(list(knows(code))) == 1


@pytest.mark.parametrize("code", ["mode == 'full'", "groups['lora']", "recipe.relora.r == 4", "label = method.label"])
def test_what_is_something_else_is_not(code):
    assert list(knows(code)) == []


def test_every_method_has_its_name_and_a_file_of_its_own():
    assert len(HOMES) == len(METHODS)
    assert all(method_class(name).name == name for name in METHODS)


def test_what_a_recipe_means_is_the_methods_answer():
    """Full-rank steps, low-rank steps, restarts, and whether there are frozen weights under the updates."""
    given = ["warm_start_steps=100", "train.steps=600", "relora.restart_every=125", "relora.restart_warmup_steps=10"]
    given += ["optim.warmup_steps=20"]
    answers = {}
    for name in METHODS:
        refused = ["warm_start_steps=0"] if name == "switchlora" else []
        method = method_of(load_recipe("tiny", [*given, *refused, f"method={name}"]))
        answers[name] = (method.full_rank_steps, method.low_rank_steps, method.num_restarts, method.warm_start_steps)
    assert answers == {
        "full": (600, 0, 0, 0),
        "control": (600, 0, 0, 0),
        "lora": (0, 600, 0, 0),
        "relora": (100, 500, 3, 100),
        "galore": (100, 500, 3, 100),
        "switchlora": (0, 600, 0, 0),
        "cola": (600, 0, 0, 0),
        "cola_m": (600, 0, 0, 0),
        "crnet": (600, 0, 0, 0),
        **dict.fromkeys(("fira", "apollo", "apollo_mini", "scale", "muon", "sst"), (600, 0, 0, 0)),
    }
    lora = method_of(load_recipe("tiny", [*given, "method=lora", "lora.base=warm_start"]))
    assert (lora.full_rank_steps, lora.low_rank_steps, lora.num_restarts) == (100, 500, 0)
    assert lora.has_base and lora.label == "lora (warm_start base)"
    assert not method_of(load_recipe("tiny", ["method=lora", "warm_start_steps=0"])).has_base


def test_a_new_method_is_one_file_and_one_line(tmp_path, monkeypatch):
    """A method that halves the warm start, in a file that nobody else has heard of."""
    (tmp_path / "half_warm.py").write_text(
        "from relora_ds.methods.lowrank import LowRank\n"
        "class HalfWarm(LowRank):\n"
        "    name = 'half_warm'\n"
        "    full_rank_steps = property(lambda self: self.recipe.warm_start_steps // 2)\n"
        "    def recipe_problems(self):\n"
        "        if self.recipe.compile:\n"
        "            yield 'compile: true does not fit method half_warm; use false'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "half_warm", "half_warm:HalfWarm")
    recipe = load_recipe("tiny", ["method=half_warm", "warm_start_steps=10", "relora.restart_every=null"])
    from relora_ds.training.phases import phases_of

    assert [(phase.name, phase.start, phase.stop) for phase in phases_of(recipe)] == [
        ("warm_start", 0, 5),
        ("half_warm", 5, recipe.total_steps),
    ]
    with pytest.raises(ValueError, match="compile: true does not fit method half_warm"):
        load_recipe("tiny", ["method=half_warm", "compile=true"])

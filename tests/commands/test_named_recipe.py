"""`train`, `check` and `estimate` take the recipe in the same two ways."""

import pytest

from relora_ds import train as training
from relora_ds.__main__ import main
from relora_ds.commands import recipes
from relora_ds.config import RecipeError

COMMANDS = ("train", "check", "estimate")


def code_of(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as error:
        return int(error.code)


@pytest.fixture
def loaded(monkeypatch) -> list[tuple[str, list[str]]]:
    """What the commands load; then they stop."""
    found = []

    def load(recipe, overrides=()):
        found.append((recipe, list(overrides)))
        raise RecipeError(["loaded"])

    monkeypatch.setattr(training, "load_recipe", load)
    monkeypatch.setattr(recipes, "load_recipe", load)
    return found


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "words",
    ["tiny_full relora.r=2 seed=1", "--config tiny_full relora.r=2 seed=1", "relora.r=2 --config tiny_full seed=1"],
)
def test_by_its_name_or_by_an_option(loaded, command, words):
    assert code_of(command, *words.split()) == 2
    assert loaded == [("tiny_full", ["relora.r=2", "seed=1"])]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("tiny relora.r=2 --config quickstart", "tiny and --config quickstart"),
        ("tiny --config tiny", "tiny and --config tiny"),
        ("tiny relora.r", "tiny and relora.r"),
    ],
)
def test_two_recipes_are_refused_with_both_names(loaded, capsys, command, words, named):
    assert code_of(command, *words.split()) == 2
    assert f"recipe: {named} are given; give one, and overrides as section.key=value" in capsys.readouterr().err
    assert loaded == []


def test_none_is_the_quickstart_for_training_alone(loaded, capsys):
    assert code_of("train", "relora.r=2") == 2
    assert loaded == [("quickstart", ["relora.r=2"])]
    for command in ("check", "estimate"):
        assert code_of(command, "relora.r=2") == 2
        assert "recipe: none is given; give one, such as quickstart" in capsys.readouterr().err
    assert len(loaded) == 1


def test_the_deepspeed_launchers_argument_is_no_recipe(loaded):
    assert training.main(["--local_rank=0", "tiny", "relora.r=2"]) == 2
    assert loaded == [("tiny", ["relora.r=2"])]

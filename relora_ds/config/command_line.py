"""A recipe and its overrides on a command line, in one form for training and for what is asked before it."""

import argparse

from relora_ds.config.errors import RecipeError
from relora_ds.config.names import recipe_names


def add_recipe(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `RECIPE [section.key=value …]`, and `--config RECIPE` for the same.

    default: the recipe where none is given; None: one must be.
    """
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE [section.key=value ...]",
        help=f"a YAML file, or a shipped recipe ({', '.join(recipe_names())}), and overrides of its keys; text is "
        "taken as it is" + (f" (default: {default})" if default else ""),
    )
    parser.add_argument("--config", metavar="RECIPE", help="another way to name the recipe")
    parser.set_defaults(default_recipe=default)


def recipe_of(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """Return the name or path of the recipe, and the overrides in their order; nothing of them is read.

    Raises:
        RecipeError: there is no recipe, or more than one.
    """
    names = [word for word in arguments.words if "=" not in word]
    given = " and ".join([*names, *([f"--config {arguments.config}"] if arguments.config else [])])
    if len(names) + bool(arguments.config) > 1:
        raise RecipeError(
            [f"recipe: {given} are given; give one, and overrides as section.key=value, e.g. relora.r=64"]
        )
    recipe = arguments.config or next(iter(names), arguments.default_recipe)
    if recipe is None:
        raise RecipeError(["recipe: none is given; give one, such as quickstart"])
    return recipe, [word for word in arguments.words if "=" in word]

"""Read a recipe: find its file, merge the sources, check the values."""

import os
from collections.abc import Sequence
from pathlib import Path

from relora_ds.config import merge, rules, validate
from relora_ds.config.errors import RecipeError
from relora_ds.config.names import PACKAGE_DIR, recipe_names
from relora_ds.config.schema import Recipe


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), check_files: bool = True) -> Recipe:
    """Read a recipe, lay the overrides over it, and check all of it; see `read_recipe`.

    Raises RecipeError with every unknown key, wrong type, bad value and missing file.
    """
    recipe, problems = read_recipe(name_or_path, overrides, check_files)
    if problems:
        raise RecipeError(problems, str(name_or_path))
    return recipe


def read_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), check_files: bool = True
) -> tuple[Recipe, list[str]]:
    """Return (the recipe as far as it can be read, everything that is wrong with it).

    name_or_path: a YAML file, or the name of a shipped recipe. overrides: `section.key=value`, the value as the field's
    type reads it (`relora.target_modules=[q_proj,v_proj]`, `train.tokens=1.2e9`, `eval.every=null`; text is taken as it
    is); later ones win, and one that sets train.tokens also takes back the train.steps of the recipe (so for all of
    `schema.ONE_OF`).
    check_files: False for tools that read the recipe of a run whose data may be elsewhere.

    A file may start from another recipe, `extends: NAME_OR_PATH` (a path starts at the file's directory): its own
    values lie over that one's, leaf by leaf. The Recipe that comes out knows nothing of it.
    """
    path, problems = _find(str(name_or_path))
    values, readable, _ = merge.read_values(path, _find, problems) if path else ({}, False, [])
    values = merge.lay_over(values, merge.read_overrides(overrides, problems))
    recipe, untrusted = merge.fill_in(values, problems)
    if recipe.run_dir is None:
        recipe.run_dir = f"runs/{Path(name_or_path).stem}"
    if readable:  # without a file, whatever it would have set is missing, and the rest means nothing
        messages = validate.problems(recipe, check_files)
        problems += [m for m in messages if not any(rules.mentions(m, key) for key in untrusted)]
    return recipe, problems


def recipe_files(name_or_path: str | Path) -> list[Path]:
    """Return the file of a recipe and those that it extends; [] when there is none."""
    path, _ = _find(str(name_or_path))
    return merge.read_values(path, _find, [])[2] if path else []


def _find(name_or_path: str, directory: Path = Path()) -> tuple[Path | None, list[str]]:
    """Return (the recipe's file, []), or (None, [what is wrong]). directory: where relative paths start."""
    path = directory / os.path.expanduser(name_or_path)
    if os.path.isfile(path):  # no error for a name that is too long
        return path, []
    if name_or_path in recipe_names():
        return PACKAGE_DIR / "recipes" / f"{name_or_path}.yaml", []
    hint = rules.nearest(Path(name_or_path).stem, recipe_names())
    return None, [
        f"no file {str(path)!r}, and no shipped recipe of that name{hint}; shipped: {', '.join(recipe_names())}"
    ]

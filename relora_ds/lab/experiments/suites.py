"""What a suite declares: the rows of an experiment, and sweeps of rows over one quantity.

    title: one line
    text: what the paper did, and what is asked here
    reference: the row that the others are compared with
    seeds: runs of every row
    seeds_of_best: runs of the best row of every sweep's group, and of every row outside of sweeps; more than `seeds`
    spectra: whether the singular values of the updates belong to the results
    rows:
      NAME: {recipe: full, set: [section.key=value, ...], paper: {130M: 23.65}}
    sweeps:
      - {axis: learning rate, set: ["optim.lr={value}"], values: {tiny: [...], small: [...], paper: [...]}, rows: {...}}

`recipe` is what follows the scale in the name of a shipped recipe. In `set`, `{value}` is the sweep's, and
`{full.optim.lr}` is what the recipe `full` of the same scale says. A sweep's `set` may differ by scale, as its `values`
do: `set: {tiny: [...], small: [...], paper: [...]}`. At a scale that `values` leaves out there are no such rows. A list
in a `set`, as the alias of a YAML anchor is, counts as its elements.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from relora_ds.config import METHODS, Recipe, load_recipe, recipe_names

DIRECTORY = Path(__file__).parent / "suites"
# scale -> how its recipes begin. 130M is the paper's smallest network that restarts often enough to see it.
SCALES = {"tiny": "tiny", "mini": "mini", "small": "small", "paper": "llama_130m"}


@dataclass(frozen=True)
class Row:
    """One row of a suite's table.

    Attributes:
        name: unique in the suite.
        axis, group, value: of a sweep's row what is swept, the row that it was made of, and the value; else None.
        recipe, overrides: what is trained, but for the seed.
        paper: perplexities that the paper prints, by model size.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    axis: str | None = None
    group: str | None = None
    value: float | None = None
    paper: dict[str, float | str] | None = None


@dataclass(frozen=True)
class Suite:
    """A suite at one scale; see the head of this file."""

    name: str
    scale: str
    title: str
    text: str
    rows: tuple[Row, ...]
    reference: str | None
    seeds: int
    seeds_of_best: int | None
    spectra: bool


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def read_suite(name: str, scale: str) -> Suite:
    """Return a shipped suite. ValueError for an unknown name or scale, and for a suite without rows at the scale."""
    if name not in suite_names():
        raise ValueError(f"SUITE: {name} is none; there are {', '.join(suite_names())}")
    if scale not in SCALES:
        raise ValueError(f"--scale: {scale} is none; there are {', '.join(SCALES)}")
    declared = yaml.safe_load((DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8"))
    shipped = {method: f"{SCALES[scale]}_{method}" for method in METHODS}
    recipes = {
        method: load_recipe(name, check_files=False) for method, name in shipped.items() if name in recipe_names()
    }
    rows = [_row(row, about, scale, recipes) for row, about in declared.get("rows", {}).items()]
    for sweep in declared.get("sweeps", []):
        if scale not in sweep["values"]:
            continue
        changes = sweep["set"] if isinstance(sweep["set"], list) else sweep["set"][scale]
        rows += [
            _row(group, {**about, "set": [*about.get("set", []), *changes]}, scale, recipes, sweep["axis"], value)
            for group, about in sweep["rows"].items()
            for value in sweep["values"][scale]
        ]
    if not rows:
        raise ValueError(f"--scale: {name} has no rows at {scale}; use {' or '.join(_scales_of(declared))}")
    return Suite(
        name,
        scale,
        declared["title"],
        declared["text"],
        tuple(rows),
        declared.get("reference"),
        declared["seeds"],
        declared.get("seeds_of_best"),
        declared.get("spectra", False),
    )


def _scales_of(declared: dict) -> list[str]:
    return [scale for scale in SCALES if any(scale in sweep["values"] for sweep in declared["sweeps"])]


def _row(
    name: str, about: dict, scale: str, recipes: dict[str, Recipe], axis: str | None = None, value: float | None = None
) -> Row:
    parts = (part if isinstance(part, list) else [part] for part in about.get("set", []))
    overrides = tuple(text.format(value=value, **recipes) for part in parts for text in part)
    return Row(
        name if axis is None else f"{name}, {axis} {value:g}",
        f"{SCALES[scale]}_{about['recipe']}",
        overrides,
        axis,
        name if axis else None,
        value,
        about.get("paper"),
    )

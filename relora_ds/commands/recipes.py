"""What `check` and `estimate` have in common: the recipe of a command line, its precision, and tables."""

import argparse

from relora_ds.config import command_line, load_recipe


def checked_recipe(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """Return `(recipe, overrides)`, whose values are in order; torch is not imported for that.

    Raises:
        RecipeError: there is no recipe, or more than one; or every value that is wrong.
    """
    name, overrides = command_line.recipe_of(arguments)
    load_recipe(name, overrides)
    return name, overrides


def require_ranks(*numbers: int | None, option: str = "--world-size") -> None:
    """ValueError where one of `option` is below 1; None is one that was not given."""
    for size in numbers:
        if size is not None and size < 1:
            raise ValueError(f"{option}: {size} is not a number of ranks; use 1 or more")


def planned_bf16() -> bool | None:
    """`cuda_bf16` of `resolve`: what this machine's GPUs can do, or bf16 without any: the run will have some."""
    import torch

    return None if torch.cuda.is_available() else True


def precision_as_text(resolved) -> str:
    """Return the planned precision, and where it comes from if the recipe leaves it to the machine."""
    if resolved.recipe.precision != "auto":
        return resolved.precision
    import torch

    from relora_ds.zero.ds_config import precision_of

    if precision_of(resolved.deepspeed) is not None:
        return f"{resolved.precision} (auto, as the DeepSpeed configuration says)"
    if torch.cuda.is_available():
        return f"{resolved.precision} (auto, on this machine)"
    return f"{resolved.precision} (auto, as on GPUs; this machine would run fp32)"


def rows_as_text(rows: list[list[str]], num_left: int = 1, indent: str = "  ") -> list[str]:
    """Lines of a table: the first `num_left` columns to the left, the others right; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent
        + "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

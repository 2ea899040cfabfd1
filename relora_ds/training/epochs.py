"""How often a run reads its corpora."""

from collections.abc import Sequence

from relora_ds.config import Recipe
from relora_ds.config.data_config import of_part
from relora_ds.data.preparation import Extent


def epochs_lines(recipe: Recipe, extents: Sequence[Extent]) -> list[str]:
    """Return a line with the number of epochs for each corpus. extents: of their training text; [] gives no lines."""
    taken = recipe.total_steps * recipe.batch_sequences
    rows = [extent.sequences for extent in extents]
    if recipe.data.mix is None:
        return [f"epochs: {taken / number:.2f} ({taken:,} sequences of a corpus of {number:,})" for number in rows]
    return [
        f"epochs of {one.label}: {taken * one.weight / number:.2f} ({taken * one.weight:,.0f} of {taken:,} sequences, "
        f"of a corpus of {number:,})"
        for one, number in zip(recipe.data.mix, rows, strict=False)
    ]


def short_corpora(recipe: Recipe, extents: Sequence[Extent]) -> list[str]:
    """Return a warning for each corpus that ends before its max_tokens."""
    parts, found = recipe.data.parts(), []
    weights = [1.0] if recipe.data.mix is None else [one.weight for one in recipe.data.mix]
    for index, (part, weight, extent) in enumerate(zip(parts, weights, extents, strict=True)):
        if part.max_tokens is None or extent.tokens >= part.max_tokens:
            continue
        epochs = recipe.total_steps * recipe.batch_sequences * weight / extent.sequences
        repeated = f"; the run reads it {epochs:.2f} times" if epochs > 1 else ""
        message = (
            f"data.max_tokens: {part.max_tokens} is more than the {extent.tokens} training tokens of the "
            f"corpus{repeated}; use a larger corpus, or remove it"
        )
        found.append(message if recipe.data.mix is None else of_part(message, index))
    return found

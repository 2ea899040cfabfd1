"""How often a run reads its corpus."""

from relora_ds.config import Recipe


def epochs_line(recipe: Recipe, num_sequences: int) -> str:
    """Return a line with the number of epochs. num_sequences: rows of the training corpus."""
    taken = recipe.total_steps * recipe.batch_sequences
    return f"epochs: {taken / num_sequences:.2f} ({taken:,} sequences of a corpus of {num_sequences:,})"


def short_corpus(recipe: Recipe, train_tokens: int, num_sequences: int) -> list[str]:
    """Return a warning for a corpus that ends before data.max_tokens, or nothing."""
    asked = recipe.data.max_tokens
    if asked is None or train_tokens >= asked:
        return []
    epochs = recipe.total_steps * recipe.batch_sequences / num_sequences
    repeated = f"; the run reads it {epochs:.2f} times" if epochs > 1 else ""
    return [
        f"data.max_tokens: {asked} is more than the {train_tokens} training tokens of the corpus{repeated}; use a "
        "larger corpus, or remove it"
    ]

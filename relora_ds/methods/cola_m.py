"""CoLA-M (arXiv 2502.10940): CoLA that keeps of each layer its input and the r-wide products `A·x`.

Backward repeats the rest, as `models.recompute` does it: gradients are CoLA's to the bit.
"""

from collections.abc import Iterator
from types import MappingProxyType

from relora_ds.methods.cola import CoLA


class CoLAM(CoLA):
    """A name for `cola` with a mode of activation checkpointing."""

    name = "cola_m"
    defaults = MappingProxyType({"activation_checkpointing": "low_rank"})

    def recipe_problems(self) -> Iterator[str]:
        """Yield what would make it another method."""
        yield from super().recipe_problems()
        mode = self.recipe.activation_checkpointing
        if mode != "low_rank":
            yield (
                f"activation_checkpointing: {mode} is not CoLA-M, which keeps low-rank products alone; use low_rank, "
                "or method=cola"
            )

"""Sparse Spectral Training (SST, arXiv 2405.15481): singular values, and some singular vectors at a time.

See `matrix.sst_update`, also for what is inferred.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from relora_ds.methods.owner import Owner

if TYPE_CHECKING:
    from relora_ds.matrix.sst_update import SST as Rule


class SST(Owner):
    """Adam of the singular values of every weight, and of r of its singular vectors."""

    name = "sst"
    sections = ("sst",)
    has_rank = True
    takes_experts = False

    def recipe_problems(self) -> Iterator[str]:
        """Yield what does not go with factors of single matrices, which alone change a weight."""
        yield from super().recipe_problems()
        if decay := self.recipe.optim.weight_decay:
            yield (
                f"optim.weight_decay: {decay} is not supported with method {self.name}, whose factors alone change a "
                "weight; use weight_decay=0"
            )
        if names := self.relora.target_parameters:
            yield (
                f"relora.target_parameters: {names} is not supported with method {self.name}, which decomposes single "
                "matrices; name their module in relora.trainable_modules, which trains it with AdamW"
            )

    def recipe_warnings(self) -> Iterator[str]:
        """Yield an iteration that ends within its warm-up."""
        yield from super().recipe_warnings()
        sst = self.recipe.sst
        if sst.iteration_steps < sst.iteration_warmup_steps:
            yield (
                f"sst.iteration_warmup_steps: {sst.iteration_warmup_steps} is more than sst.iteration_steps "
                f"{sst.iteration_steps}: the learning rate of the weights never reaches its peak"
            )

    def rule(self) -> "Rule":
        """Return the rule of a linear's weight."""
        from relora_ds.matrix.sst_update import SST as Rule

        optim = self.recipe.optim
        return Rule(self.relora.r, (optim.betas[0], optim.betas[1]), optim.eps, **dataclasses.asdict(self.recipe.sst))

"""Fira (arXiv 2410.01623): GaLore, and beside it what GaLore leaves out of the gradient. See `matrix.fira_update`."""

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING

from relora_ds.methods.owner import Owner

if TYPE_CHECKING:
    from relora_ds.matrix.fira_update import Fira as Rule


class Fira(Owner):
    """Adam in a subspace of each gradient, and the rest of the gradient scaled as Adam scales that."""

    name = "fira"
    sections = ("fira",)
    has_rank = True
    defaults = MappingProxyType({"optim.eps": 1e-6})

    def rule(self) -> "Rule":
        """Return the rule of a linear's weight."""
        from relora_ds.matrix.fira_update import Fira as Rule

        return Rule(r=self.relora.r, adam=self.projected_adam(), **dataclasses.asdict(self.recipe.fira))

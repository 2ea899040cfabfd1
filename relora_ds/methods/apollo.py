"""APOLLO (arXiv 2412.05270): the gradient itself, as long as Adam would make it. See `matrix.apollo_update`."""

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING

from relora_ds.methods.owner import Owner

if TYPE_CHECKING:
    from relora_ds.matrix.apollo_update import Apollo as Rule


class Apollo(Owner):
    """SGD whose steps have the length that Adam gives a random projection of the gradient."""

    name = "apollo"
    sections = ("apollo",)
    has_rank = True
    defaults = MappingProxyType({"optim.eps": 1e-6})

    def rule(self) -> "Rule":
        """Return the rule of a linear's weight."""
        from relora_ds.matrix.apollo_update import Apollo as Rule

        return Rule(r=self.rank or 1, adam=self.projected_adam(), **dataclasses.asdict(self.recipe.apollo))

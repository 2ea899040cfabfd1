"""Muon (Jordan et al., 2024): orthogonal momentum, the yardstick of full-rank training. See `matrix.muon_update`."""

import dataclasses
from typing import TYPE_CHECKING

from relora_ds.methods.owner import Owner

if TYPE_CHECKING:
    from relora_ds.matrix.muon_update import Muon as Rule


class Muon(Owner):
    """Orthogonal updates of the linears' weights."""

    name = "muon"
    sections = ("muon",)

    def rule(self) -> "Rule":
        """Return the rule of a linear's weight."""
        from relora_ds.matrix.muon_update import Muon as Rule

        return Rule(**dataclasses.asdict(self.recipe.muon))

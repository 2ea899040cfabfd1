"""What methods have in common once there is a model."""

from typing import TYPE_CHECKING

from relora_ds.config.methods import Method

if TYPE_CHECKING:
    from torch import nn


class TrainingMethod(Method):
    """A method with the usual groups: low-rank factors, other matrices, and vectors without weight decay."""

    def param_groups(self, model: "nn.Module") -> list[dict]:
        """Return the optimizer's groups of a prepared model."""
        from relora_ds.lowrank.wrap import parameter_groups

        return parameter_groups(model, weight_decay=self.recipe.optim.weight_decay)

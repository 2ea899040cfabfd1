"""The gradients of all owned weights: summed up on every rank in its backwards, then reduced to the owners."""

import torch.distributed as dist
from torch import Tensor

from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.zero.frozen_master import FrozenWeights


class GradientSums:
    """One fp32 sum a layer, `[..., out, in]`, on the rank's device. Collective: all ranks make every call."""

    def __init__(self, frozen: FrozenWeights):
        self._owners = frozen.owners
        self._sums: dict[str, GradientSum] = {}
        for name, layer in frozen.layers.items():
            self._sums[name] = layer.gradient_sum = GradientSum(layer.shape_of_gradient, frozen.device)

    def reduce(self, name: str) -> Tensor | None:
        """Return the mean over ranks of a layer's sum on its owner, in place; begin anew on the others.

        The owner zeroes the tensor once it has used it.
        """
        total, owner = self._sums[name].values, self._owners[name]
        dist.reduce(total, owner)
        if owner != dist.get_rank():
            total.zero_()
            return None
        return total.div_(dist.get_world_size())

    def drop(self) -> None:
        """Begin anew everywhere."""
        for total in self._sums.values():
            total.values.zero_()

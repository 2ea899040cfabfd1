"""The gradients of all owned weights: summed up on every rank in its backwards, then reduced to the owners.

Where `overlaps`, the last backward of an optimizer step starts to reduce a sum as soon as it is complete, while it
computes the gradients of the layers below. All ranks must start in the same order: that of the modules, last layer
first. A sum whose turn has not come waits in its place, and `start_left` starts it. So it does for layers that one
backward may call several times or not at all: those that the first step has not called once a backward, on every rank.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.zero.frozen_master import FrozenWeights


class GradientSums:
    """One fp32 sum a layer, `[..., out, in]`, on the rank's device. Collective: all ranks make every call.

    Args:
        overlaps: whether `begin_backward` is called before every backward, and `start_left` before `reduce`.
    """

    def __init__(self, frozen: FrozenWeights, *, overlaps: bool = False):
        self._owners, self._device = frozen.owners, frozen.device
        self._sums: dict[str, GradientSum] = {}
        for name, layer in frozen.layers.items():
            self._sums[name] = layer.gradient_sum = GradientSum(layer.shape_of_gradient, frozen.device)
        self._reducing: dict[str, dist.Work] = {}
        self._overlaps = overlaps and dist.get_world_size() > 1
        if self._overlaps:
            # Of its own: between DeepSpeed's collectives of a backward these come in another order on each rank.
            self._group = dist.new_group()
            self._order: list[str] | None = None  # None: not known before the first step
            self._calls = dict.fromkeys(self._sums, 0)  # in the backwards of this step
            self._backwards, self._next, self._is_last = 0, 0, False
            for name, total in self._sums.items():
                total.added = partial(self._added, name)

    def begin_backward(self, *, is_last: bool) -> None:
        """Tell of the coming backward. is_last: of its optimizer step."""
        if self._overlaps:
            self._backwards, self._is_last = self._backwards + 1, is_last

    def start_left(self) -> None:
        """Start to reduce what the last backward has not started."""
        if not self._overlaps:
            return
        if self._order is None:
            self._order = self._called_once()
        for name in [*self._order, *self._sums]:
            if name not in self._reducing:
                self._start(name)
        self._calls = dict.fromkeys(self._sums, 0)
        self._backwards, self._next, self._is_last = 0, 0, False

    def reduce(self, name: str) -> Tensor | None:
        """Return the mean over ranks of a layer's sum on its owner, in place; begin anew on the others.

        The owner zeroes the tensor once it has used it.
        """
        total, owner = self._sums[name].values, self._owners[name]
        if (work := self._reducing.pop(name, None)) is None:
            dist.reduce(total, owner)
        else:
            work.wait()
        if owner != dist.get_rank():
            total.zero_()
            return None
        return total.div_(dist.get_world_size())

    def own(self, name: str) -> Tensor:
        """Return what this rank has summed up of a layer, in place. Zero it once it is used."""
        return self._sums[name].values

    def drop(self) -> None:
        """Begin anew everywhere."""
        for total in self._sums.values():
            total.values.zero_()

    def _start(self, name: str) -> None:
        total, owner = self._sums[name].values, self._owners[name]
        self._reducing[name] = dist.reduce(total, owner, group=self._group, async_op=True)

    def _added(self, name: str) -> None:
        """Note that a backward has added to a sum, and start what is complete and has its turn."""
        if name in self._reducing:
            raise RuntimeError(
                f"relora.target_modules: a backward has called {name} once more than those of the first step, when its "
                "gradient was being reduced; leave it out with relora.exclude_modules"
            )
        self._calls[name] += 1
        if not self._is_last or self._order is None:
            return
        while self._next < len(self._order) and self._calls[self._order[self._next]] == self._backwards:
            self._start(self._order[self._next])
            self._next += 1

    def _called_once(self) -> list[str]:
        """Return the layers that every backward of this step has called once, on all ranks, last one first."""
        names = list(self._sums)
        others = torch.tensor(
            [self._calls[name] != self._backwards for name in names], dtype=torch.int32, device=self._device
        )
        dist.all_reduce(others, op=dist.ReduceOp.MAX)
        return [name for name, is_other in zip(names, others.tolist(), strict=True) if not is_other][::-1]

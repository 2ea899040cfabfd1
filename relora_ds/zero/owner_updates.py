"""Updates of the frozen weights between restarts, by their owners, from gradients that each rank sums up for itself.

    in every backward   each layer adds its gradient of W to an fp32 sum on its device; nothing is sent
    every H steps       the sums are reduced to the owners of the weights, one layer of each owner at a time. An owner
                        takes out what the chain follows itself, computes the change of W, makes it in the fp32 master
                        (without masters: in the stored copy) and broadcasts the stored copy, as at a merge
    in a checkpoint     what a period has so far is reduced to the owners, who keep it and write it

A one-sided chain follows `(G·Aᵀ)·A` of a gradient G. A does not change within a period, so that `G - (G·Aᵀ)·A` of the
sum is the sum of those of the steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from relora_ds.lowrank.precision import exact_products
from relora_ds.zero.accelerator import now
from relora_ds.zero.frozen_master import FrozenWeights
from relora_ds.zero.gradient_sums import GradientSums
from relora_ds.zero.shards import ShardView

COPIES = 4  # of a layer's W in fp32: what the owner of a square one has alive at once beside the sum itself

Update = Callable[[Tensor], Tensor]  # what to add to W at the peak learning rate, for a gradient `[..., out, in]`


class OwnerUpdates:
    """What the layers of an engine sum up, and the updates by it. Collective: all ranks make every call.

    Args:
        update: gets the mean gradient of a period's steps over the global batch, fp32, without what a one-sided chain
            follows itself, and returns a new tensor.

    Attributes:
        every: H; updates come after steps `t` that it divides.
        steps: applied steps of the period so far.
        count: updates so far.
        seconds: of the newest.
    """

    def __init__(self, frozen: FrozenWeights, shards: ShardView, every: int, update: Update, seed: int):
        self.every, self.steps, self.count, self.seconds = every, 0, 0, 0.0
        self._frozen, self._shards, self._update, self._seed = frozen, shards, update, seed
        self._held: dict[str, Tensor] = {}  # of the owned weights: means over ranks, summed up until a checkpoint
        self._sums = GradientSums(frozen)

    def after_step(self, t: int, factor: float) -> None:
        """Count an applied step, and update W if a period ends with it.

        Args:
            t: applied steps.
            factor: the learning rate of this one, as a part of the peak.
        """
        self.steps += 1
        if self.is_due(t):
            self.apply(factor)

    def is_due(self, t: int) -> bool:
        """Return whether a period ends with step `t`."""
        return t % self.every == 0

    @torch.no_grad()
    def apply(self, factor: float) -> None:
        """Update W by what the period has so far, and begin another one; nothing where it has no step yet."""
        if not self.steps:
            return
        started = now(self._frozen.device)
        self._shards.drop_gathered_copies()
        frozen, samples = self._frozen, {}
        for names in frozen.rounds():
            bases = {name: frozen.read_A(name) for name in names if name in frozen.one_sided}
            # All of them first: then the owners compute at the same time.
            gradients = {name: self._reduce(name) for name in names}
            stored: dict[str, Tensor] = {}
            for name, gradient in gradients.items():
                change = None if gradient is None else self._change(name, gradient, bases.get(name), factor)
                if (base := frozen.read(name, frozen.device)) is not None and change is not None:
                    key = f"{self._seed}/{self.count}/{name}.weight/residual"
                    stored[name], samples[name] = frozen.add(name, base, change, key)
            for name in names:
                frozen.publish(name, stored.pop(name, None), frozen.device)
        frozen.masters.settle()
        frozen.add_to_ledgers(samples)
        self.steps, self.count = 0, self.count + 1
        self._held.clear()
        self.seconds = now(self._frozen.device) - started

    def drop(self) -> None:
        """Begin another period, without what this one has so far."""
        self.steps = 0
        self._held.clear()
        self._sums.drop()

    @torch.no_grad()
    def hold(self) -> dict[str, Tensor]:
        """Give the owners what the period has so far. Return this rank's part by layer, fp32 on the CPU.

        The tensors stay as they are.
        """
        for name in self._frozen.layers if self.steps else ():
            if (total := self._reduce(name)) is not None:
                self._held[name] = total.to("cpu", copy=True)
                total.zero_()
        return dict(self._held)

    def restore(self, steps: int, read: Callable[[str], Tensor]) -> None:
        """Continue a period that has `steps` so far. read: what `hold` returned of an owned layer."""
        self.drop()
        self.steps = steps
        self._held = {name: read(name) for name in self._frozen.owned()} if steps else {}

    def _reduce(self, name: str) -> Tensor | None:
        """Return the sum of a layer over steps, a mean over ranks, on its owner."""
        total = self._sums.reduce(name)
        if total is None or name not in self._held:
            return total
        return total.add_(self._held[name].to(total.device))

    def _change(self, name: str, gradient: Tensor, basis: Tensor | None, factor: float) -> Tensor:
        """Return what to add to W, in its own layout. gradient: the sum of the layer, which begins anew."""
        layer = self._frozen.layers[name]
        gradient.div_(self.steps)
        if basis is not None:
            with exact_products():
                take_out = gradient.addmm_ if gradient.ndim == 2 else gradient.baddbmm_
                take_out(gradient @ basis.mT, basis, alpha=-1)
            if layer.r == layer.in_features:
                gradient.zero_()  # the basis spans everything: what is left is rounding, and would be blown up
        is_finite = torch.isfinite(torch.linalg.vector_norm(gradient, torch.inf))
        change = self._update(gradient).mul_(factor / layer.rho)  # forward multiplies W by ρ
        change.masked_fill_(~is_finite, 0.0)  # W stays as it is where the gradients of B have shown nothing
        gradient.zero_()
        return change.mT if layer.transposed else change

"""The full gradient of every frozen weight in one step, without a device ever holding more than one of them.

A layer's backward multiplies its gradient out, in fp32. It is reduced to the owner of the weight at once, and summed up
there in host memory over the micro-batches, spread over the ranks as the masters are. All ranks must reduce in the same
order: that of the modules, last layer first. What a backward has before its turn, in a model that calls its layers in
another order, waits in the host memory of each rank: at worst a gradient of every layer.

Of some layers not every rank's backward knows when it has all of the gradient: routed experts, which may get no token,
and layers that a model calls several times. What is left of these waits there too, and is reduced when the backward is
over.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.lowrank.precision import exact_products
from relora_ds.zero.frozen_master import FrozenWeights


class _Tap:
    """A layer's `lowrank.reinit.GradientTap`, which hands the gradient on."""

    def __init__(self, gradients: "ExactGradients", name: str):
        self._gradients, self._name = gradients, name

    def add(self, g: Tensor, rows: Tensor) -> None:
        self._gradients.add(self._name, g, rows)


class ExactGradients:
    """The gradients of one optimizer step. Make it before its first forward; taps are set on the layers."""

    def __init__(self, frozen: FrozenWeights):
        self._frozen = frozen
        self._order = [name for name in reversed(frozen.layers) if "expert" not in name]
        self._next = 0  # of `_order`, to be reduced
        self._waiting: dict[str, Tensor] = {}  # on the host
        self._sums: dict[str, Tensor] = {}
        for name, layer in frozen.layers.items():
            layer.sketch = _Tap(self, name)

    def add(self, name: str, g: Tensor, rows: Tensor) -> None:
        """Add this rank's gradient of one backward, `gᵀ·rows`. Reduces it, and others, if it is their turn.

        g: `[n, out]`; rows: `[n, in]`.
        """
        with exact_products():
            gradient = g.float().t() @ rows.float()
        if self._turn != name:
            on_host = gradient.cpu()
            self._waiting[name] = self._waiting[name].add_(on_host) if name in self._waiting else on_host
            return
        self._reduce(name, gradient)
        del gradient  # before the device has another one
        self._next += 1
        while self._turn in self._waiting:
            self._reduce(self._turn, self._waiting.pop(self._turn))
            self._next += 1

    def finish_backward(self) -> None:
        """Reduce what is left of a backward. Collective: call it after every backward."""
        for name in self._order[self._next :]:  # ranks that have come to these wait for those that have not
            self._reduce(name, self._waiting.pop(name, None))
        self._next = 0
        names = list(self._frozen.layers)
        left = torch.tensor([name in self._waiting for name in names], dtype=torch.int32, device=self._frozen.device)
        dist.all_reduce(left, op=dist.ReduceOp.MAX)
        for name, anywhere in zip(names, left.tolist(), strict=True):
            if anywhere:
                self._reduce(name, self._waiting.pop(name, None))

    def take(self, name: str) -> Tensor | None:
        """Return the sum over ranks and micro-batches, fp32 on the CPU, on the weight's owner; it is given away."""
        return self._sums.pop(name, None)

    @property
    def _turn(self) -> str | None:
        """The layer to be reduced next in this backward."""
        return self._order[self._next] if self._next < len(self._order) else None

    def _reduce(self, name: str, gradient: Tensor | None) -> None:
        layer, owner = self._frozen.layers[name], self._frozen.owners[name]
        if gradient is None:
            gradient = torch.zeros(layer.out_features, layer.in_features, device=self._frozen.device)
        gradient = gradient.to(self._frozen.device)
        dist.reduce(gradient, owner)
        if owner == dist.get_rank():
            on_host = gradient.cpu()
            self._sums[name] = self._sums[name].add_(on_host) if name in self._sums else on_host

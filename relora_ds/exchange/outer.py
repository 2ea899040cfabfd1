"""The outer optimizer: what islands make of the mean of their updates at an exchange.

    average     W + lr·D
    nesterov    b <- momentum·b + D;  W + lr·(D + momentum·b)

D is the mean of what the islands have added to W since they were last equal. With -D for the gradient this is
`torch.optim.SGD(nesterov=True)`, as DiLoCo (arXiv 2311.08105) uses it. The momentum b is fp32 and of W's shape, on the
host of the rank that owns W; it never travels.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Outer:
    """Momenta by name, each on the owner of its weight alone.

    Args:
        lr: factor on what is applied. A momentum of 0 with an lr of 1 is the plain mean.
    """

    def __init__(self, lr: float, momentum: float):
        self.lr, self.momentum = lr, momentum
        self._momenta: dict[str, Tensor] = {}

    @torch.no_grad()
    def step_(self, name: str, mean: Tensor) -> Tensor:
        """Return what to add to the weight; uses `mean` up. name: of the weight."""
        if not self.momentum:
            return mean.mul_(self.lr) if self.lr != 1 else mean
        if name not in self._momenta:
            self._momenta[name] = torch.zeros(mean.shape)
        kept = self._momenta[name]
        momentum = kept.to(mean.device, mean.dtype, copy=True).mul_(self.momentum).add_(mean)
        kept.copy_(momentum)
        return mean.add_(momentum, alpha=self.momentum).mul_(self.lr)

    def held(self) -> dict[str, Tensor]:
        """Return copies of this rank's momenta."""
        return {name: value.clone() for name, value in self._momenta.items()}

    def restore(self, names: list[str], read: Callable[[str], Tensor | None]) -> None:
        """Take the momenta of this rank's weights over; of those that `read` does not know they begin anew."""
        found = {name: read(name) for name in names} if self.momentum else {}
        self._momenta = {name: value for name, value in found.items() if value is not None}

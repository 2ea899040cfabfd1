"""The whole gradient of a low-rank layer's W, summed up where it is computed."""

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from relora_ds.lowrank.precision import exact_products

_numbers = itertools.count()
_sums: weakref.WeakValueDictionary[str, "GradientSum"] = weakref.WeakValueDictionary()


class GradientSum:
    """`G = gᵀ·x`, `[..., out, in]` in fp32, over backward passes (a `GradientTap`).

    Costs what the gradient of a weight that trains costs: one product, and a tensor of the weight's size.

    Args:
        shape: `[..., out, in]`, whatever the layout of the weight.

    Attributes:
        added: called after every backward that has added to it.
        key: of this one and no other of the process; see `sum_of`.
    """

    added: Callable[[], None] | None = None

    def __init__(self, shape: torch.Size, device: torch.device | str = "cpu"):
        self.values = torch.zeros(shape, device=device)
        self.key = str(next(_numbers))
        _sums[self.key] = self

    def add(self, g: Tensor, rows: Tensor) -> None:
        """Add one backward of a linear. g: `[n, out]`; rows: `[n, in]`, its input."""
        with exact_products(of=g.dtype):
            self.values.addmm_(g.float().t(), rows.float())
        self._tell()

    def add_rows(self, ids: Tensor, g: Tensor, padding_idx: int | None = None) -> None:
        """Add one backward of an embedding. ids: `[...]`; g: `[..., in]`; padding_idx: of a row without a gradient."""
        ids, g = ids.flatten(), g.reshape(-1, g.shape[-1]).float()
        if padding_idx is not None:
            g = g.masked_fill((ids == padding_idx).unsqueeze(1), 0.0)
        self.values.index_add_(0, ids, g)
        self._tell()

    def add_gradient(self, gradient: Tensor) -> None:
        """Add one backward of a parameter, `[..., out, in]`."""
        self.values.add_(gradient)
        self._tell()

    def _tell(self) -> None:
        if self.added is not None:
            self.added()


def sum_of(key: str) -> GradientSum:
    """Return the sum with this key."""
    return _sums[key]

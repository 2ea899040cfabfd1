"""Adam's moments of one rank, whatever dtype they are kept in: read and written in fp32."""

from typing import Protocol

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class Moment(Protocol):
    """A moment of this rank's piece of a parameter, 1-D."""

    def numel(self) -> int:
        """Return its number of elements, which may be 0."""

    def read(self) -> Tensor:
        """Return it in fp32, `[numel]`: a view or a copy, so not to be written to."""

    def write(self, values: Tensor, at: int = 0) -> None:
        """Set the elements from `at` on to `values`, 1-D."""

    def keep(self, mask: Tensor) -> None:
        """Set the elements outside of a bool mask `[numel]` to 0; the others keep their exact values."""


class DenseMoment:
    """A moment in fp32. view: of the optimizer's tensor, 1-D and writable."""

    def __init__(self, view: Tensor):
        self._view = view

    def numel(self) -> int:
        return self._view.numel()

    def read(self) -> Tensor:
        return self._view

    def write(self, values: Tensor, at: int = 0) -> None:
        self._view[at : at + values.numel()].copy_(values)

    def keep(self, mask: Tensor) -> None:
        self._view.mul_(mask.to(self._view.device))

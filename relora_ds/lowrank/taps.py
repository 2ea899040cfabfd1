"""How backward adds the gradient of W to a layer's taps, as it is or compiled by `torch.compile`.

A compiled backward calls operators (`torch.ops.relora_ds`) that get the key of a `GradientSum` and not its tensor: a
collective reads that, and Python code is told that it has changed. The compiler drops operators whose results nobody
uses. So these return what backward does use: the gradient for the rest of it, or a zero that becomes the gradient of
the layer's anchor. Sketches have no operators: steps that have them are not compiled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from relora_ds.lowrank.gradient_sum import GradientSum, sum_of
from relora_ds.lowrank.reinit import GradientTap


def add_products(taps: Sequence[GradientTap], g: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Add one backward of a linear. g: `[n, out]`; rows: `[n, in]`, its input.

    Returns:
        g, for the rest of backward, and the gradient of the layer's anchor.
    """
    if torch.compiler.is_compiling():
        anchor = None
        for tap in taps:
            assert isinstance(tap, GradientSum), "a step with a sketch is not compiled"
            g, anchor = torch.ops.relora_ds.add_products(g, rows, tap.key)
        return g, anchor
    for tap in taps:
        tap.add(g, rows)
    return g, None


def add_rows(total: GradientSum | None, ids: Tensor, g: Tensor, padding_idx: int | None) -> Tensor | None:
    """Add one backward of an embedding (`GradientSum.add_rows`). Return the gradient of the layer's anchor."""
    if total is None:
        return None
    if torch.compiler.is_compiling():
        return torch.ops.relora_ds.add_rows(ids, g, padding_idx, total.key)
    total.add_rows(ids, g, padding_idx)
    return None


def add_gradient(total: GradientSum | None, gradient: Tensor) -> Tensor | None:
    """Add one backward of a parameter, `[..., out, in]`. Return the gradient of the layer's anchor."""
    if total is None:
        return None
    if torch.compiler.is_compiling():
        return torch.ops.relora_ds.add_gradient(gradient, total.key)
    total.add_gradient(gradient)
    return None


def _add_products(g: Tensor, rows: Tensor, key: str) -> tuple[Tensor, Tensor]:
    sum_of(key).add(g, rows)
    return g.clone(), torch.zeros(())  # an operator returns no tensor that it was given


def _add_rows(ids: Tensor, g: Tensor, padding_idx: int | None, key: str) -> Tensor:
    sum_of(key).add_rows(ids, g, padding_idx)
    return torch.zeros(())


def _add_gradient(gradient: Tensor, key: str) -> Tensor:
    sum_of(key).add_gradient(gradient)
    return torch.zeros(())


_library = torch.library.Library("relora_ds", "FRAGMENT")
_library.define("add_products(Tensor g, Tensor rows, str key) -> (Tensor, Tensor)")
_library.define("add_rows(Tensor ids, Tensor g, int? padding_idx, str key) -> Tensor")
_library.define("add_gradient(Tensor gradient, str key) -> Tensor")
for _kernel in (_add_products, _add_rows, _add_gradient):
    _library.impl(_kernel.__name__[1:], _kernel, "CompositeExplicitAutograd")
torch.library.register_fake(
    "relora_ds::add_products", lambda g, rows, key: (torch.empty_like(g), torch.empty((), device="cpu"))
)
torch.library.register_fake("relora_ds::add_rows", lambda ids, g, padding_idx, key: torch.empty((), device="cpu"))
torch.library.register_fake("relora_ds::add_gradient", lambda gradient, key: torch.empty((), device="cpu"))

"""OwnedEmbedding: an embedding whose weight its owner updates, as `owned_linear.OwnedLinear`'s."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.lowrank.owned_layer import OwnedLayer
from relora_ds.lowrank.taps import add_rows


class OwnedEmbedding(OwnedLayer):
    """A lookup table, `[num_embeddings, embedding_dim]`, stored densely.

    Args:
        embedding: whose weight is taken over.
    """

    def __init__(self, embedding: nn.Embedding):
        weight = embedding.get_parameter("weight")
        super().__init__(torch.Size((embedding.num_embeddings, embedding.embedding_dim)), weight)
        self.num_embeddings, self.embedding_dim = self.weight_shape
        self.padding_idx = embedding.padding_idx
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids `[...]` to `[..., embedding_dim]`."""
        return _Lookup.apply(ids, self.weight, self.gradient_sum, self.padding_idx, self._anchor)

    def plain(self) -> nn.Embedding:
        """Return the kind of module that the layer replaced, without values."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class _Lookup(torch.autograd.Function):
    """Rows of a weight that autograd does not train. anchor: needs a gradient, so that there is a backward."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, total: GradientSum | None, padding_idx: int | None, anchor):
        ctx.save_for_backward(ids)
        ctx.total, ctx.padding_idx = total, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor):
        (ids,) = ctx.saved_tensors
        return None, None, None, None, add_rows(ctx.total, ids, grad_y, ctx.padding_idx)

"""Weights that can only be had all at once."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_ds.models.without_values import named_tensors


class WholeWeights:
    """The weights of a model that rank 0 loads whole when the first of them is read; the others load nothing.

    Attributes:
        shapes: of every parameter (tied ones once) and persistent buffer, by name.
        owners: rank 0 for all.
    """

    def __init__(self, model: nn.Module, load: Callable[[], PreTrainedModel]):
        """model: of the shapes that are expected, with or without values."""
        self.shapes: Mapping[str, torch.Size] = {name: tensor.shape for name, tensor in named_tensors(model).items()}
        self.owners: Mapping[str, int] | None = dict.fromkeys(self.shapes, 0)
        self._load = load
        self._loaded: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """Return a tensor in fp32. Each can be read once."""
        if not self._loaded:
            self._loaded = {name: tensor.detach() for name, tensor in named_tensors(self._load()).items()}
        return self._loaded.pop(name)

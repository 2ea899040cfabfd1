"""A micro-batch of the loader as what a model takes."""

from typing import Any

import torch
from torch import Tensor

from relora_ds.models.attention import document_bounds


def inputs_of(micro_batch: dict[str, Tensor], model, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `model`, an engine or a module, for a micro-batch on the host; tensors on `device`."""
    inputs: dict[str, Any] = dict(micro_batch)
    if (position_ids := micro_batch.get("position_ids")) is not None:
        config = getattr(model, "module", model).config.get_text_config(decoder=True)
        inputs |= document_bounds(config._attn_implementation, position_ids)
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }

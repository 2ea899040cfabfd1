"""Whether a network, and this machine, have the attention implementation that a recipe names, and what it needs."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.models.loading import from_config

FIELD = "model.attn_implementation"
EVERYWHERE = ("eager", "sdpa")  # on every machine
WITH_MASK = (*EVERYWHERE, "flex_attention")  # all others are flash-attention's kernels, or are called as these are
_SUPPORT = {"sdpa": "_supports_sdpa", "flash": "_supports_flash_attn", "flex": "_supports_flex_attn"}


def problems(model: PreTrainedModel, name: str) -> list[str]:
    """Return why the network cannot use `name`, on any machine."""
    kind = next((kind for kind in _SUPPORT if name.startswith(kind)), None)
    if kind is None or getattr(model, _SUPPORT[kind], False):  # eager, or a kernel of the hub
        return []
    other = "sdpa or eager" if model._supports_sdpa else "eager"
    return [f"{FIELD}: {name} is not available for {model.config.model_type} models; use {other}"]


def precision_problems(name: str, precision: str) -> list[str]:
    """Return why `name` cannot be used in the run's precision."""
    if not name.startswith("flash") or precision != "fp32":
        return []
    return [f"{FIELD}: {name} computes in 16 bit only, and the run's precision is fp32; use sdpa, or precision=bf16"]


def machine_problems(config: PretrainedConfig, name: str) -> list[str]:
    """Return what this machine lacks for `name`: a package, or a GPU."""
    try:
        with torch.device("meta"):
            from_config(config, dtype=torch.bfloat16, attn_implementation=name)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        return [f"{FIELD}: {name} cannot be used on this machine ({reason}); use sdpa"]
    return []


def document_bounds(name: str, position_ids: Tensor) -> dict[str, Tensor | int]:
    """Return the inputs by which kernels without a mask keep documents apart; {} where transformers makes a mask.

    Without them transformers looks for documents in the positions, but only of a batch of one row, and in every layer
    the host waits for the device.

    Args:
        name: of the implementation.
        position_ids: `[rows, length]`, 0 where a document begins, as every row does.
    """
    if name in WITH_MASK:
        return {}
    begins = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = F.pad(begins, (0, 1), value=position_ids.numel()).int()
    longest = position_ids.shape[1]  # that a document may have: a value that stays the same
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}

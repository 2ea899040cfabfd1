"""Whether a network, and this machine, have the attention implementation that a recipe names."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.models.loading import from_config

FIELD = "model.attn_implementation"
EVERYWHERE = ("eager", "sdpa")  # on every machine
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

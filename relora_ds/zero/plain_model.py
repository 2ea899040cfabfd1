"""A plain transformers model from collected weights."""

import torch
from torch import Tensor, nn


def load_plain(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load a collected state into an unwrapped model; names that are absent must be tied to one that is there.

    Raises:
        ValueError: naming the missing or unexpected weights.
    """
    aliases = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    missing = [name for name, p in model.named_parameters(remove_duplicate=False)
               if name not in state and id(p) not in aliases]
    unexpected = sorted(set(state) - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if missing or unexpected:
        raise ValueError(f"weights: missing {missing or 'none'}, unexpected {unexpected or 'none'}; "
                         "they are of another model")
    model.load_state_dict(state, strict=False)
    return model


def save_plain(module: nn.Module, state: dict[str, Tensor], directory: str, dtype: torch.dtype) -> None:
    """Write `state` as a transformers model of the class and config of `module`."""
    if not hasattr(module, "save_pretrained"):
        raise ValueError(f"save_merged: {type(module).__name__} is no transformers model (no save_pretrained); "
                         "use collect_merged() and save the tensors yourself")
    plain = type(module)(module.config).to(dtype)
    load_plain(plain, state).save_pretrained(directory)

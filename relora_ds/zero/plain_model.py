"""A plain transformers model from collected weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from relora_ds.zero.saved_config import save_model


def load_plain(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Give an unwrapped model the tensors `state`; names that are absent must be tied to one that is there.

    Raises:
        ValueError: naming the missing or unexpected weights, those of another shape, or two that differ and are tied in
            the model.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **persistent_buffers(model)}
    owners: dict[int, str] = {}
    for name in state.keys() & tensors.keys():
        other = owners.setdefault(id(tensors[name]), name)
        if not torch.equal(state[other], state[name]):
            raise ValueError(
                f"weights: {other} and {name} differ, but share one tensor in this model; set "
                "tie_word_embeddings to false in its configuration"
            )
    aliases = {id(tensor) for name, tensor in tensors.items() if name in state}
    missing = [name for name, tensor in tensors.items() if name not in state and id(tensor) not in aliases]
    unexpected = sorted(set(state) - set(tensors))
    reshaped = [
        f"{name} {tuple(value.shape)} instead of {tuple(tensors[name].shape)}"
        for name, value in state.items()
        if name in tensors and value.shape != tensors[name].shape
    ]
    if missing or unexpected or reshaped:
        raise ValueError(
            f"weights: missing {missing or 'none'}, unexpected {unexpected or 'none'}, of another shape "
            f"{reshaped or 'none'}; they are of another model"
        )
    for name, value in state.items():
        _take_over(tensors[name], value)
    return model


def _take_over(tensor: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer, with or without a value so far, another one; `value` is not copied."""
    new = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    torch.utils.swap_tensors(tensor, new)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return what is saved with a model without being a parameter, by name: such as the bias of an experts' router."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


def save_plain(module: nn.Module, state: dict[str, Tensor], directory: str, dtype: torch.dtype) -> None:
    """Write `state` as a transformers model of the class and config of `module`."""
    save_model(plain_like(module, state).to(dtype), directory)


def plain_like(module: nn.Module, state: dict[str, Tensor]) -> Any:
    """Return an unwrapped model of the class and config of `module` that consists of the tensors `state`.

    It is there to be saved: its non-persistent buffers may have no values.
    """
    config = export_config(module.config)
    try:
        with torch.device("meta"):
            plain = type(module)(config)
    except Exception:  # code of a family that computes with its parameters while it builds them
        with torch.random.fork_rng(devices=[]):  # its random weights must not change the data order of what follows
            plain = type(module)(config)
    if own_generation_config(module):
        plain.generation_config = copy.deepcopy(module.generation_config)
    return load_plain(plain, state)


def export_config(config):
    """Return a copy of a model's configuration with the key-value cache that training switched off."""
    config = copy.deepcopy(config)
    config.use_cache = True
    return config


def own_generation_config(module: nn.Module) -> bool:
    """Return whether a model came with settings for generation, rather than with some made of its config."""
    settings = getattr(module, "generation_config", None)
    return settings is not None and not settings._from_model_config

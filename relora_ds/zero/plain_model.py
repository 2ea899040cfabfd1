"""A plain transformers model from collected weights."""

import copy

import torch
from torch import Tensor, nn


def load_plain(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load a collected state into an unwrapped model; names that are absent must be tied to one that is there.

    Raises:
        ValueError: naming the missing or unexpected weights, or those of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases = {id(p) for name, p in parameters.items() if name in state}
    missing = [name for name, p in parameters.items() if name not in state and id(p) not in aliases]
    unexpected = sorted(set(state) - set(parameters))
    reshaped = [f"{name} {tuple(value.shape)} instead of {tuple(parameters[name].shape)}"
                for name, value in state.items() if name in parameters and value.shape != parameters[name].shape]
    if missing or unexpected or reshaped:
        raise ValueError(f"weights: missing {missing or 'none'}, unexpected {unexpected or 'none'}, of another shape "
                         f"{reshaped or 'none'}; they are of another model")
    model.load_state_dict(state, strict=False)
    return model


def save_plain(module: nn.Module, state: dict[str, Tensor], directory: str, dtype: torch.dtype) -> None:
    """Write `state` as a transformers model of the class and config of `module`."""
    if not hasattr(module, "save_pretrained"):
        raise ValueError(f"save_merged: {type(module).__name__} is no transformers model (no save_pretrained); "
                         "use collect_merged() and save the tensors yourself")
    plain = type(module)(export_config(module.config)).to(dtype)
    if own_generation_config(module):
        plain.generation_config = module.generation_config
    load_plain(plain, state).save_pretrained(directory)


def export_config(config):
    """A copy of a model's configuration for those who use it: with the key-value cache that training switched off."""
    config = copy.deepcopy(config)
    config.use_cache = True
    return config


def own_generation_config(module: nn.Module) -> bool:
    """Whether a model brought settings for generation with it, rather than having them made up from its config."""
    settings = getattr(module, "generation_config", None)
    return settings is not None and not settings._from_model_config

"""Whether embeddings and output head share a weight: the parameters decide, and the configuration is made to agree.

`config.tie_word_embeddings` decides what transformers builds from a saved model. Where it disagrees with the parameters
(a head trained by itself, a flag set after loading), one of two heads would be lost, or be missing, when it is loaded.
"""

import copy
from typing import Any

import torch
from torch import nn

_WORDS = {True: "share a weight", False: "have weights of their own"}


def align_tie_flag(model: nn.Module) -> str | None:
    """Make `model.config.tie_word_embeddings` agree with the parameters, in place.

    Returns:
        A warning where the flag was changed; None where it was right, or the model is not one of transformers.

    Raises:
        ValueError: no value of the flag makes the model's class build these parameters.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or (tied := _is_tied(model)) is None or _built_tied(model) == tied:
        return None
    flags = {
        id(part): (part, part.tie_word_embeddings)
        for part in (config, config.get_text_config(decoder=True))
        if hasattr(part, "tie_word_embeddings")
    }
    said = config.tie_word_embeddings
    for part, _ in flags.values():
        part.tie_word_embeddings = tied
    if _built_tied(model) != tied:
        for part, before in flags.values():
            part.tie_word_embeddings = before
        raise ValueError(
            f"model: embeddings and output head {_WORDS[tied]}, and {type(model).__name__} cannot be "
            f"saved and loaded like that; {'untie' if tied else 'tie'} them before wrapping"
        )
    return (
        f"config.tie_word_embeddings: {said} does not agree with the model, whose embeddings and output head "
        f"{_WORDS[tied]}; it is set to {tied}, so that exports and checkpoints are loaded as this model"
    )


def _is_tied(model: Any) -> bool | None:
    """Return whether one weight serves both; None where the model does not have both."""
    try:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    weights = [getattr(module, "weight", None) for module in (embeddings, head)]
    return None if any(weight is None for weight in weights) else weights[0] is weights[1]


def _built_tied(model: nn.Module) -> bool | None:
    """Return what `_is_tied` says of a model that its class builds from its configuration."""
    try:
        with torch.device("meta"):
            return _is_tied(type(model)(copy.deepcopy(model.config)))
    except Exception:  # a class with other arguments: nobody can build it from its configuration
        return _is_tied(model)

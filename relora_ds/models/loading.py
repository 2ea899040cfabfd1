"""What is asked of transformers' Auto classes: configurations, and models of them with or without their weights."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

import relora_ds.architectures  # noqa: F401 (known to the Auto classes from here on)
from relora_ds.config.remote_code import UntrustedCode, is_refusal


def load_config(name_or_path: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    """`AutoConfig.from_pretrained`; the result refers to code that comes with the model only where that is trusted.

    Raises:
        UntrustedCode: code would have to run that is not trusted.
        Exception: those of transformers.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if is_refusal(error):
            raise UntrustedCode(str(name_or_path)) from error
        raise
    if not trust_remote_code:
        auto_map = vars(config).pop("auto_map", None) or {}
        if AutoModelForCausalLM.__name__ in auto_map and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UntrustedCode(str(name_or_path))
        if "/" in str(config._attn_implementation):  # a kernel of the hub
            config._attn_implementation = None
    return config


def load_model(name_or_path: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`; see `load_config`."""
    return load_weights(
        name_or_path,
        config=load_config(name_or_path, trust_remote_code),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


def load_weights(name_or_path: str | Path, **options) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, which would give weights that are not there random values."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **options)
    model, report = loaded
    refuse_missing(name_or_path, report["missing_keys"])
    return model


def refuse_missing(name_or_path: str | Path, names: Iterable[str]) -> None:
    """Raise a ValueError where weights are missing."""
    if missing := sorted(names):
        raise ValueError(
            f"{name_or_path}: the weights of {len(missing)} parameters are missing (first: {missing[0]}); "
            "if it is the output head, tie_word_embeddings in config.json may have to be true"
        )


def from_config(config: PretrainedConfig, **options) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_config`, with the model's own code where `load_config` left a reference to it."""
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), trust_remote_code=hasattr(config, "auto_map"), **options
    )

"""Build or load the network that a recipe names.

Three sources: a preset (LLaMA shapes of the ReLoRA and GaLore papers, `presets.json`), a Hugging Face configuration
(hub id, directory or JSON file) with random weights, or the same with its pretrained weights. Every model is a
`transformers` causal language model in fp32. It is built without values, and its weights are read one tensor at a time.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from relora_ds.config import ModelConfig
from relora_ds.config.remote_code import UntrustedCode
from relora_ds.config.rules import nearest
from relora_ds.models.loading import from_config, load_config
from relora_ds.models.pretrained_weights import StoredWeights, pretrained_weights
from relora_ds.models.random_weights import RandomWeights
from relora_ds.models.stored_head import tied_as_stored
from relora_ds.models.whole_weights import WholeWeights
from relora_ds.models.without_values import build_without_values, fill

# What all presets share. 1024 positions at least, as in the papers' configurations; rotary positions cost nothing.
_PRESET_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_PRESET_MIN_POSITIONS = 1024

# Published models pad the embedding above the tokenizer's size, to a multiple of 64 to 512 rows.
_MAX_VOCAB_PADDING = 1024


def build_config(
    model: ModelConfig,
    vocab_size: int,
    seq_len: int,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """Return the configuration of the network, fitted to the tokenizer and the sequence length.

    vocab_size: size of the tokenizer, in pieces; it replaces the configuration's own for random weights. seq_len: in
    tokens. The ids are the tokenizer's; None = it has no such token.

    ValueError: unknown preset or source, seq_len above the model's maximum (presets are stretched instead), or
    pretrained weights for another vocabulary than the tokenizer's.
    """
    if model.preset is not None:
        config = _preset_config(model.preset, seq_len)
    elif model.name_or_path is not None:
        config = _named_config(model.name_or_path, trust_remote_code)
    else:
        raise ValueError("model.preset and model.name_or_path: neither is set; set one of them")
    text = config.get_text_config(decoder=True)  # models of images and text have their language model's apart
    longest = getattr(text, "max_position_embeddings", None) or 0
    if 0 < longest < seq_len:  # XLNet says -1: it has no limit
        raise ValueError(
            f"data.seq_len: {seq_len} is above the {longest} positions of {model.name_or_path}; use "
            f"data.seq_len={longest} or another model"
        )
    if model.init == "pretrained":
        _check_vocabulary(model, text, vocab_size)
        assert model.name_or_path is not None  # the recipe's checks have said so
        tied_as_stored(config, meta_model(config), model.name_or_path)
    else:
        for part in (config, text):
            part.vocab_size = vocab_size
            _set_token_ids(part, bos_token_id=bos_id, eos_token_id=eos_id, pad_token_id=pad_id)
    config.use_cache = text.use_cache = False
    return config


def _set_token_ids(config: PretrainedConfig, **ids: int | None) -> None:
    for name, token_id in ids.items():
        try:
            setattr(config, name, token_id)
        except StrictDataclassFieldValidationError:  # some families, such as Mllama, do not take None
            setattr(config, name, 0)


def _preset_config(name: str, seq_len: int) -> PretrainedConfig:
    presets = json.loads((Path(__file__).parent / "presets.json").read_text())
    if name not in presets:
        raise ValueError(f"model.preset: {name!r} is unknown{nearest(name, presets)}; known: {', '.join(presets)}")
    positions = max(seq_len, _PRESET_MIN_POSITIONS)
    values: dict[str, Any] = {**_PRESET_DEFAULTS, **presets[name]}
    return LlamaConfig(**values, max_position_embeddings=positions)


def _named_config(name_or_path: str, trust_remote_code: bool) -> PretrainedConfig:
    local = Path(name_or_path).expanduser()
    try:
        config = load_config(str(local) if local.exists() else name_or_path, trust_remote_code)
    except UntrustedCode as error:
        raise ValueError(f"model.name_or_path: {error}") from error
    except Exception as error:  # OSError, ValueError, KeyError, ..., by what is wrong with it
        raise ValueError(
            f"model.name_or_path: {name_or_path!r} has no readable configuration; use a hub id, a "
            f"directory with config.json, or a JSON file with model_type ({error})"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        kind = ", an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else ""
        raise ValueError(
            f"model.name_or_path: {name_or_path} is a {config.model_type} model{kind}, which is no causal "
            "language model of transformers; choose a decoder-only family such as LLaMA, Qwen or GPT-NeoX"
        )
    return config


def _check_vocabulary(model: ModelConfig, config: PretrainedConfig, vocab_size: int) -> None:
    padding = config.vocab_size - vocab_size
    if not 0 <= padding < _MAX_VOCAB_PADDING:
        raise ValueError(
            f"model.init: the pretrained weights of {model.name_or_path} have a vocabulary of "
            f"{config.vocab_size}, the tokenizer has {vocab_size}; use "
            f"data.tokenizer={model.name_or_path}, or model.init=random"
        )


def build_model(
    config: PretrainedConfig, model: ModelConfig, seed: int, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the network, fp32 on the CPU: random weights drawn from `seed` alone, or the pretrained ones.

    The same seed gives the same weights on every rank, and the global random state is left as it was.
    """
    return fill(model_without_values(config, model), initial_weights(config, model, seed, trust_remote_code))


def model_without_values(config: PretrainedConfig, model: ModelConfig | None = None) -> PreTrainedModel:
    """Return the network with its parameters on the meta device, and its buffers with the values that they begin with.

    Args:
        model: gives the attention and, for pretrained weights, the settings for generation; None: `config` alone.
    """
    if model is None:
        return build_without_values(config, dtype=torch.float32)
    network = build_without_values(config, dtype=torch.float32, attn_implementation=model.attn_implementation)
    if model.init == "pretrained" and model.name_or_path is not None and network.can_generate():
        with suppress(OSError):  # it has none of its own
            network.generation_config = GenerationConfig.from_pretrained(model.name_or_path)
    return network


def initial_weights(
    config: PretrainedConfig, model: ModelConfig, seed: int, trust_remote_code: bool = False
) -> RandomWeights | StoredWeights | WholeWeights:
    """Return the source of weights that `build_model` fills the network with, one tensor at a time."""
    if model.init == "pretrained":
        assert model.name_or_path is not None  # the recipe's checks have said so
        return pretrained_weights(model.name_or_path, config, trust_remote_code)
    return RandomWeights(config, seed)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the network without storage (meta device), for counting and checks. Takes milliseconds at any size."""
    with torch.device("meta"):
        try:
            return from_config(config, dtype=torch.float32)
        except Exception as error:  # whatever the code of a family raises
            raise ValueError(cannot_build(config, error)) from error


def cannot_build(config: PretrainedConfig, error: Exception) -> str:
    """Return the message about a configuration of which transformers makes no network."""
    return (
        f"model: transformers cannot build this {config.model_type} model ({type(error).__name__}: {error}); "
        "correct its configuration"
    )


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the network, tied ones once."""
    return sum(p.numel() for p in meta_model(config).parameters())

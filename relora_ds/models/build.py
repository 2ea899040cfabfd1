"""Build or load the network that a recipe names.

Three sources: a preset (LLaMA shapes of the ReLoRA and GaLore papers, `presets.json`), a Hugging Face configuration
(hub id, directory or JSON file) with random weights, or the same with its pretrained weights. Every model is a
`transformers` causal language model, in fp32 on the CPU: masters are taken before anything is cast.
"""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from relora_ds.config import ModelConfig, preset_names
from relora_ds.recipe_validation import nearest

__all__ = ["build_config", "build_model", "count_parameters", "meta_model", "preset_names"]

# What all presets share. 1024 positions at least, as in the papers' configurations; rotary positions cost nothing.
_PRESET_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02,
                    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
_PRESET_MIN_POSITIONS = 1024

# Published models pad the embedding above the tokenizer's size, to a multiple of 64 to 512 rows.
_MAX_VOCAB_PADDING = 1024


def build_config(model: ModelConfig, vocab_size: int, seq_len: int, bos_id: int | None = None,
                 eos_id: int | None = None, pad_id: int | None = None,
                 trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the network, fitted to the tokenizer and the sequence length.

    vocab_size: size of the tokenizer, in pieces; it replaces the configuration's own for random weights. seq_len: in
    tokens. The ids are the tokenizer's; None = it has no such token.

    ValueError: unknown preset or source, seq_len above the model's maximum (presets are stretched instead), or
    pretrained weights for another vocabulary than the tokenizer's.
    """
    if model.preset is not None:
        config = _preset_config(model.preset, seq_len)
    elif model.name_or_path is not None:
        config = _load_config(model.name_or_path, trust_remote_code)
    else:
        raise ValueError("model.preset and model.name_or_path: neither is set; set one of them")
    text = config.get_text_config(decoder=True)  # models of images and text have their language model's apart
    longest = getattr(text, "max_position_embeddings", None) or 0
    if 0 < longest < seq_len:  # XLNet says -1: it has no limit
        raise ValueError(f"data.seq_len: {seq_len} is above the {longest} positions of {model.name_or_path}; use "
                         f"data.seq_len={longest} or another model")
    if model.init == "pretrained":
        _check_vocabulary(model, text, vocab_size)
    else:
        for part in (config, text):
            part.vocab_size = vocab_size
            part.bos_token_id, part.eos_token_id, part.pad_token_id = bos_id, eos_id, pad_id
    config.use_cache = text.use_cache = False
    return config


def _preset_config(name: str, seq_len: int) -> PretrainedConfig:
    presets = json.loads((Path(__file__).parent / "presets.json").read_text())
    if name not in presets:
        raise ValueError(f"model.preset: {name!r} is unknown{nearest(name, presets)}; known: {', '.join(presets)}")
    positions = max(seq_len, _PRESET_MIN_POSITIONS)
    return LlamaConfig(**_PRESET_DEFAULTS, **presets[name], max_position_embeddings=positions)


def _load_config(name_or_path: str, trust_remote_code: bool) -> PretrainedConfig:
    local = Path(name_or_path).expanduser()
    try:
        return AutoConfig.from_pretrained(str(local) if local.exists() else name_or_path,
                                          trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.name_or_path: {name_or_path!r} has no readable configuration; use a hub id, a "
                         f"directory with config.json, or a JSON file with model_type ({error})") from error


def _check_vocabulary(model: ModelConfig, config: PretrainedConfig, vocab_size: int) -> None:
    padding = config.vocab_size - vocab_size
    if not 0 <= padding < _MAX_VOCAB_PADDING:
        raise ValueError(f"model.init: the pretrained weights of {model.name_or_path} have a vocabulary of "
                         f"{config.vocab_size}, the tokenizer has {vocab_size}; use "
                         f"data.tokenizer={model.name_or_path}, or model.init=random")


def build_model(config: PretrainedConfig, model: ModelConfig, seed: int,
                trust_remote_code: bool = False) -> PreTrainedModel:
    """The network, fp32 on the CPU: random weights drawn from `seed` alone, or the pretrained ones.

    The same seed gives the same weights on every rank, and the global random state is left as it was.
    """
    options = {"dtype": torch.float32, "attn_implementation": model.attn_implementation,
               "trust_remote_code": trust_remote_code}
    # devices=[] and the CPU generator alone: torch.manual_seed would also reseed every CUDA device.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if model.init == "pretrained":
            return AutoModelForCausalLM.from_pretrained(model.name_or_path, config=copy.deepcopy(config), **options)
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The network without storage (meta device), for counting and checks. Takes milliseconds at any size."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the network, tied ones once."""
    return sum(p.numel() for p in meta_model(config).parameters())

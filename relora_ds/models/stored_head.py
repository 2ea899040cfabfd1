"""Whether stored weights have an output head of their own where the configuration says that there is none."""

from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel


def tied_as_stored(config: PretrainedConfig, model: PreTrainedModel, name_or_path: str | Path) -> PretrainedConfig:
    """Set `tie_word_embeddings` to False, in place, where the weights hold a head that differs from the embeddings.

    transformers loads such weights untied, with a warning, whatever the flag says.

    Args:
        model: what `config` builds, on the meta device.
        name_or_path: a model directory or a hub id. Only files on this machine are read, and only safetensors.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return config
    first, second = (_find(_directory(name_or_path), f"{names[id(part)]}.weight") for part in (embeddings, head))
    if first is not None and second is not None and not torch.equal(first, second):
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
    return config


def _directory(name_or_path: str | Path) -> Path:
    local = Path(name_or_path).expanduser()
    if local.is_dir():
        return local
    cached = try_to_load_from_cache(str(name_or_path), "config.json") if not local.exists() else None
    return Path(cached).parent if isinstance(cached, str) else local


def _find(directory: Path, name: str) -> torch.Tensor | None:
    for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else []:
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (not a dict)
                return file.get_tensor(name)
    return None

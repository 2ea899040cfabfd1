"""An unfinished cycle as a PEFT adapter: `W` as an ordinary model in `base/`, `A` and `B` as its LoRA adapter.

    DIR/adapter_config.json, adapter_model.safetensors      s·B·A of the current cycle
    DIR/base/                                               everything else, at its current value

An adapter belongs to one base only. ReLoRA merges into `W` at every restart, and embeddings, norms, head and biases
train at every step, so an adapter on the base of another step would silently be another function. The adapter's config
therefore names the sha256 of its base's weights, in PEFT's field for "the specific base model version to use"
(`revision`), which PEFT keeps but cannot check. `verify` and `load` do.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from relora_ds.models.build import load_model
from relora_ds.zero.checkpoint_model import SavedModel
from relora_ds.zero.saved_config import save_model

BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "base", "adapter_config.json", "adapter_model.safetensors"
_HASH = "sha256:"


def weights_sha256(directory: Path) -> str:
    """`sha256:…` of the weights in a model directory: names, dtypes, shapes and bytes, in the order of the names.

    Raises:
        ValueError: no safetensors file in it.
    """
    files = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    if not files:
        raise ValueError(f"{directory}: no weights (*.safetensors); copy the base model there")
    digest = hashlib.sha256()
    for name in sorted(files):
        with safe_open(files[name], framework="pt") as file:
            value = file.get_tensor(name)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return f"{_HASH}{digest.hexdigest()}"


def verify(directory: Path, base: Path | None = None) -> None:
    """Check that a base is the one that the adapter in `directory` was exported with.

    Args:
        base: a model directory; default `directory/base`.

    Raises:
        ValueError: another base, naming both hashes; or no adapter of relora_ds.
    """
    base = directory / BASE if base is None else base
    path = directory / ADAPTER_CONFIG
    expected = json.loads(path.read_text()).get("revision") if path.is_file() else None
    if not str(expected).startswith(_HASH):
        raise ValueError(f"{directory}: no adapter that relora_ds exported (its {ADAPTER_CONFIG} names no base by "
                         "sha256); merge a foreign adapter with PEFT's merge_and_unload and use the merged model")
    if (found := weights_sha256(base)) != expected:
        raise ValueError(f"{directory}: the adapter belongs to a base with {expected}, but {base} has {found}: the "
                         "base has moved on; use adapter and base of one export")


def load(directory: Path | str, base: Path | str | None = None, dtype: torch.dtype = torch.float32,
         is_trainable: bool = False, trust_remote_code: bool = False):
    """The `PeftModel` of an export, after `verify`. Arguments and errors: see there."""
    from peft import PeftModel
    directory = Path(directory)
    base = directory / BASE if base is None else Path(base)
    verify(directory, base)
    model = load_model(base, dtype, trust_remote_code)
    return PeftModel.from_pretrained(model, str(directory), is_trainable=is_trainable)


def save(saved: SavedModel, base: PreTrainedModel, directory: Path) -> None:
    """Write base and adapter.

    Args:
        base: a model that holds `saved.base()`, in the dtype to write.
        directory: new, empty, or an earlier export with the very same base, whose adapter is replaced.

    Raises:
        ValueError: no low-rank layers, or a `base/` with other weights in `directory`.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("--format peft needs PEFT; pip install peft") from error
    config = saved.relora
    if not saved.layers:
        raise ValueError("--format peft: the checkpoint has no adapter, it trains at full rank (method full or "
                         "control, or the warm start); use --format hf")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{BASE}.", dir=directory) as temporary:
        save_model(base, temporary)
        sha256, existing = weights_sha256(Path(temporary)), directory / BASE
        if not existing.exists():
            shutil.copytree(temporary, existing)
        elif (found := weights_sha256(existing)) != sha256:
            raise ValueError(f"{directory}: its {BASE}/ has {found}, this adapter belongs to a base with {sha256}: the "
                             "base has moved on; choose another directory")
    factors = {}
    for name in saved.layers:
        for factor, value in zip(("lora_A", "lora_B"), saved.factors(name), strict=True):
            factors[f"base_model.model.{name}.{factor}.weight"] = value.to(base.dtype).contiguous()
    save_file(factors, directory / f"{ADAPTER_WEIGHTS}.tmp", metadata={"format": "pt"})
    os.replace(directory / f"{ADAPTER_WEIGHTS}.tmp", directory / ADAPTER_WEIGHTS)
    alpha = config["lora_alpha"]
    LoraConfig(
        task_type="CAUSAL_LM", r=config["r"], lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=config["lora_dropout"], target_modules=_target_modules(base, set(saved.layers)),
        base_model_name_or_path=str((directory / BASE).resolve()), revision=sha256, inference_mode=True,
    ).save_pretrained(directory)


def _target_modules(model: nn.Module, names: set[str]) -> list[str]:
    """The layers by the last part of their names, as people write it, where that names no other module."""
    last = {name.rpartition(".")[2] for name in names}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if named == names else names)

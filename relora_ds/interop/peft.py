"""An unfinished cycle as a PEFT adapter: `W` as an ordinary model in `base/`, `A` and `B` as its LoRA adapter.

    DIR/adapter_config.json, adapter_model.safetensors      s·B·A of the current cycle
    DIR/base/                                               everything else, at its current value

An adapter belongs to one base only. ReLoRA merges into `W` at every restart, and embeddings, norms, head and biases
train at every step, so an adapter on the base of another step would silently be another function. The adapter's config
therefore names the sha256 of its base's weights, in PEFT's field for "the specific base model version to use"
(`revision`), which PEFT keeps but cannot check. `verify` and `load` do.
"""

import copy
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.checkpoint.model import CheckpointWeights
from relora_ds.lowrank.frozen import add_update_
from relora_ds.lowrank.peculiarities import is_conv1d
from relora_ds.models.build import meta_model
from relora_ds.models.loading import load_model
from relora_ds.models.pretrained_weights import pretrained_weights
from relora_ds.models.whole_weights import WholeWeights
from relora_ds.models.without_values import build_without_values
from relora_ds.zero.saved_config import save_model
from relora_ds.zero.weights import WeightSource

logger = logging.getLogger(__name__)

BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "base", "adapter_config.json", "adapter_model.safetensors"
_HASH = "sha256:"
# What a LoraConfig may say beside nothing, and the update be s·B·A, with s = lora_alpha / r or lora_alpha / √r.
_PLAIN = {
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}


def weights_sha256(directory: Path) -> str:
    """`sha256:…` of the weights in a model directory: names, dtypes, shapes and bytes, in the order of the names.

    Raises:
        ValueError: no safetensors file in it.
    """
    files: dict[str, Path] = {}
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
        raise ValueError(
            f"{directory}: no adapter that relora_ds exported (its {ADAPTER_CONFIG} names no base by "
            "sha256); merge a foreign adapter with PEFT's merge_and_unload and use the merged model"
        )
    if (found := weights_sha256(base)) != expected:
        raise ValueError(
            f"{directory}: the adapter belongs to a base with {expected}, but {base} has {found}: the "
            "base has moved on; use adapter and base of one export"
        )


def load(
    directory: Path | str,
    base: Path | str | None = None,
    dtype: torch.dtype = torch.float32,
    is_trainable: bool = False,
    trust_remote_code: bool = False,
):
    """Return the `PeftModel` of an export, after `verify`. Arguments and errors: see there."""
    from peft import PeftModel

    directory = Path(directory)
    base = directory / BASE if base is None else Path(base)
    verify(directory, base)
    model = load_model(base, dtype, trust_remote_code)
    return PeftModel.from_pretrained(model, str(directory), is_trainable=is_trainable)


class MergedWeights:
    """The weights of a base with an adapter's update added, read one tensor at a time: a source of weights.

    Attributes:
        shapes, owners: those of the base.
    """

    def __init__(self, base: WeightSource, adapter: dict[str, Tensor], layers: dict[str, bool], scaling: float):
        """Merge while reading.

        Args:
            adapter: its tensors, by their names in the file.
            layers: the modules that it changes, by name; True where the weight is `[in, out]` (Conv1D).
        """
        self._base, self._adapter, self._layers, self._scaling = base, adapter, layers, scaling
        self.shapes: Mapping[str, torch.Size] = base.shapes
        self.owners: Mapping[str, int] | None = base.owners

    def read(self, name: str) -> Tensor:
        """Return a tensor, fp32 where it is floating point."""
        value, layer = self._base.read(name), name.removesuffix(".weight")
        if layer not in self._layers:
            return value
        lora_A, lora_B = (self._adapter[_factor(layer, which)].float() for which in ("A", "B"))
        return add_update_(value, lora_A, lora_B, self._scaling, transposed=self._layers[layer])


def merged_weights(directory: Path, config: PretrainedConfig, trust_remote_code: bool) -> WeightSource:
    """Return the merged weights of an export whose base `verify` has checked, for the network that `config` describes.

    An adapter that PEFT has made into more than `s·B·A` is merged by PEFT, whole, on rank 0.
    """
    about = json.loads((directory / ADAPTER_CONFIG).read_text())
    adapter = load_file(directory / ADAPTER_WEIGHTS) if (directory / ADAPTER_WEIGHTS).is_file() else {}
    base = pretrained_weights(directory / BASE, config, trust_remote_code)
    modules = dict(meta_model(config).named_modules())
    names = [name.removesuffix(".weight") for name in base.shapes]
    layers = {name: is_conv1d(modules.get(name)) for name in names if _factor(name, "A") in adapter}
    if {key for key, value in about.items() if value} <= _PLAIN and {
        _factor(layer, which) for layer in layers for which in ("A", "B")
    } == set(adapter):
        root = math.sqrt(about["r"]) if about.get("use_rslora") else about["r"]
        return MergedWeights(base, adapter, layers, about["lora_alpha"] / root)
    logger.info("%s: the adapter is not a plain one of relora_ds, so PEFT merges it whole, on rank 0", directory)
    return WholeWeights(
        build_without_values(config, dtype=torch.float32),
        lambda: load(directory, trust_remote_code=trust_remote_code).merge_and_unload(),
    )


def _factor(layer: str, which: str) -> str:
    return f"base_model.model.{layer}.lora_{which}.weight"


def save(saved: CheckpointWeights, base: PreTrainedModel, directory: Path) -> None:
    """Write base and adapter.

    Args:
        saved: the checkpoint.
        base: a model that holds its weights without updates, in the dtype to write.
        directory: new, empty, or an earlier export with the very same base, whose adapter is replaced.

    Raises:
        ValueError: no low-rank layers, or a `base/` with other weights in `directory`.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("--format peft needs PEFT; pip install peft") from error
    config, layers = saved.contents.relora, saved.contents.layers
    if not layers or config is None:
        raise ValueError(
            "--format peft: the checkpoint has no adapter: its method has no low-rank updates, or its phase is the "
            "warm start; use --format hf"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{BASE}.", dir=directory) as temporary:
        save_model(base, temporary)
        sha256, existing = weights_sha256(Path(temporary)), directory / BASE
        if not existing.exists():
            shutil.copytree(temporary, existing)
        elif (found := weights_sha256(existing)) != sha256:
            raise ValueError(
                f"{directory}: its {BASE}/ has {found}, this adapter belongs to a base with {sha256}: the "
                "base has moved on; choose another directory"
            )
    parameters = {name for name, layer in layers.items() if layer.get("is_parameter")}
    alpha = config["lora_alpha"]
    about = LoraConfig(
        task_type="CAUSAL_LM",
        r=config["r"],
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=config["lora_dropout"],
        use_rslora=config.get("use_rslora", False),
        target_modules=_target_modules(base, layers.keys() - parameters),
        target_parameters=sorted(parameters) or None,
        fan_in_fan_out=any(layer.get("transposed") for name, layer in layers.items() if name not in parameters),
        base_model_name_or_path=str((directory / BASE).resolve()),
        revision=sha256,
        inference_mode=True,
    )
    places = _places_of_parameters(base.config, about) if parameters else {}
    factors = {}
    for name in layers:
        for which, value in zip(("A", "B"), saved.factors(name), strict=True):
            factors[_factor(places.get(name, name), which)] = _as_peft(which, value).to(base.dtype).contiguous()
    save_file(factors, directory / f"{ADAPTER_WEIGHTS}.tmp", metadata={"format": "pt"})
    os.replace(directory / f"{ADAPTER_WEIGHTS}.tmp", directory / ADAPTER_WEIGHTS)
    about.save_pretrained(str(directory))


def _as_peft(which: str, factor: Tensor) -> Tensor:
    """Return a factor as PEFT keeps it: those of experts in one matrix, A's rows and B's columns side by side."""
    if factor.ndim == 2:
        return factor
    return factor.flatten(0, 1) if which == "A" else factor.permute(1, 2, 0).flatten(1)


def _places_of_parameters(config: PretrainedConfig, about) -> dict[str, str]:
    """Return where PEFT puts the factors of each of `target_parameters`: it wraps their module once for each."""
    from peft import get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    prefix = "base_model.model."
    for name, module in get_peft_model(meta_model(config), copy.deepcopy(about)).named_modules():
        if isinstance(module, ParamWrapper):
            place = name.removeprefix(prefix)
            found[f"{place.replace('.base_layer', '')}.{module.parameter_name}"] = place
    return found


def _target_modules(model: nn.Module, names: set[str]) -> list[str]:
    """Return the layers by the last part of their names, as people write it, where that names no other module."""
    last = {name.rpartition(".")[2] for name in names}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if named == names else names)

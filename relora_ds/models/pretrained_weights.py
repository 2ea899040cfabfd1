"""The weights of a pretrained model, read one tensor at a time where its files hold them as the model does."""

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from relora_ds.architectures import has_code_of_others
from relora_ds.models.loading import load_weights, refuse_missing
from relora_ds.models.whole_weights import WholeWeights
from relora_ds.models.without_values import build_without_values, tensor_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. Attributes: name: there; like: of its shape and dtype, on the meta device."""

    path: Path
    name: str
    like: Tensor


class StoredWeights:
    """Weights in safetensors files; every rank reads what it is asked for.

    Attributes:
        shapes: by the model's name of every parameter (tied ones once) and persistent buffer.
        owners: None: every rank can read all.
    """

    owners: Mapping[str, int] | None = None

    def __init__(self, places: dict[str, Stored]):
        """places: by the model's name."""
        self.shapes: Mapping[str, torch.Size] = {name: stored.like.shape for name, stored in places.items()}
        self._places = places

    def read(self, name: str) -> Tensor:
        """Return a new tensor, fp32 where it is floating point."""
        stored = self._places[name]
        with safe_open(stored.path, framework="pt") as file:
            value = file.get_tensor(stored.name)
        return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)  # not the file's memory


def pretrained_weights(
    name_or_path: str | Path, config: PretrainedConfig, trust_remote_code: bool
) -> StoredWeights | WholeWeights:
    """Return the weights of a model directory or hub id, for the network that `config` describes.

    What transformers converts when it loads (fused experts, pickles, quantized files, code of the model's own) it loads
    whole, on rank 0 alone.

    Raises:
        ValueError: weights are missing or of another shape, by name.
        Exception: those of transformers; UnpicklingError where a pickle holds more than tensors.
    """

    def load() -> PreTrainedModel:
        return load_weights(
            name_or_path, config=copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
        )

    model, files = build_without_values(config, dtype=torch.float32), _files(name_or_path)
    if not files:
        loaded = load()  # from yet another format, or with transformers' message that there is nothing
        return WholeWeights(model, lambda: loaded)
    stored = [Stored(Path(path), name, like) for path in files for name, like in load_state_dict(path, "meta").items()]
    places: dict[str, Stored] = {}
    reason = _conversion(model, stored) or _rename(model, stored, places)
    if reason is None:
        refuse_missing(name_or_path, _missing(model, places))
        reason = _difference(model, places)
    if reason is None:
        return StoredWeights(
            {names[0]: next(places[name] for name in names if name in places) for names, _ in tensor_names(model)}
        )
    logger.info("%s: %s, so transformers loads it whole, on rank 0", name_or_path, reason)
    return WholeWeights(model, load)


def _files(name_or_path: str | Path) -> list[str]:
    """Return the files with weights that transformers would choose; those of a hub id are downloaded."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = cached_file(str(name_or_path), name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            return get_checkpoint_shard_files(str(name_or_path), path)[0] if name.endswith(".json") else [path]
    return []


def _conversion(model: PreTrainedModel, stored: list[Stored]) -> str | None:
    """Return why transformers does more than to take the stored tensors by their names; None: it does not."""
    for name in ("quantization_config", "transformers_weights", "fusion_config"):
        if getattr(model.config, name, None) is not None:
            return f"its configuration has {name}"
    if has_code_of_others(model) or type(model.config).extra_files:
        return "it comes with code of its own"
    return None if all(one.path.suffix == ".safetensors" for one in stored) else "its weights are pickled"


def _rename(model: PreTrainedModel, stored: list[Stored], places: dict[str, Stored]) -> str | None:
    """Fill `places` with what is stored by the model's names; why that cannot be done, or None."""
    conversions, state = get_model_conversion_mapping(model), model.state_dict()
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    renamings: list = [each for each in conversions if not isinstance(each, WeightConverter)]
    for one in stored:
        name, converter = rename_source_key(one.name, renamings, converters, model.base_model_prefix, state)
        if converter is not None:
            return f"{one.name} is converted"
        if name in places:
            return f"{one.name} and {places[name].name} are both {name}"
        places[name] = one
    return None


def _missing(model: PreTrainedModel, places: dict[str, Stored]) -> list[str]:
    ignored = model._keys_to_ignore_on_load_missing or ()
    return [
        names[0]
        for names, _ in tensor_names(model)
        if not places.keys() & set(names) and not any(re.search(pattern, names[0]) for pattern in ignored)
    ]


def _difference(model: PreTrainedModel, places: dict[str, Stored]) -> str | None:
    """Return how the stored tensors are not the model's; None: they are."""
    for names, tensor in tensor_names(model):
        found = next((places[name].like for name in names if name in places), None)
        if found is None:
            return f"{names[0]} is not in it"
        if found.shape != tensor.shape:
            raise ValueError(
                f"{names[0]} is {tuple(found.shape)} there instead of {tuple(tensor.shape)}, as its "
                "config.json wants it"
            )
        if found.is_floating_point() != tensor.is_floating_point():
            return f"{names[0]} is of {found.dtype} there"
        if found.is_floating_point() and found.element_size() == 1:
            return f"{names[0]} is stored in 8 bit"
    return None

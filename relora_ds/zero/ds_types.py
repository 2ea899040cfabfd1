"""Check the types of values in a DeepSpeed configuration with DeepSpeed's own models."""

import json

from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from relora_ds.zero.ds_resolve import without_autos

_MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}


def problems(config: dict, name: str = "deepspeed") -> list[str]:
    """Return one line each: `<name> <key>: <value> <why>`. Sections that are no objects are left to `ds_config`."""
    found = []
    for section, model in _MODELS.items():
        if not isinstance(config.get(section), dict):
            continue
        try:
            model(**without_autos(config[section]))
        except ValidationError as error:
            for one in error.errors():
                key = ".".join(str(part) for part in (section, *one["loc"]))
                reason = one["msg"][:1].lower() + one["msg"][1:]
                found.append(
                    f"{name} {key}: {json.dumps(one['input'], default=str)[:200]} ({reason}); correct it, or remove it"
                )
    return found

"""The `optimizer` section of a DeepSpeed configuration: it may be AdamW's, also in 8 bit, and give its values."""

import math
from collections.abc import Mapping
from typing import Any

from relora_ds.zero.ds_keys import ABSENT, AUTO, get, show

_TYPES = {"adam": "adamw", "adamw": "adamw", "adamw8bit": "adamw_8bit", "adamw_8bit": "adamw_8bit"}


def problems(config: dict) -> list[str]:
    """Return what of the section cannot be, or be said so, one message each, `optimizer.<key>: ...`."""
    optimizer = config.get("optimizer")
    if optimizer is None:
        return []
    kind, name = get(config, "optimizer.type"), name_in(config)
    if name is None:
        return [
            f"optimizer.type: {show(kind)} is not available; only AdamW and AdamW8bit are (their states are pruned at "
            "a restart); remove the block"
        ]
    if kind in ("Adam", "adam") and get(config, "optimizer.params.adam_w_mode", True) is False:
        return ["optimizer.params.adam_w_mode: false is not available (L2 instead of weight decay); remove it"]
    ignored: tuple[str, ...] = ("lr", "betas", "eps", "weight_decay")
    if name == "adamw":
        ignored += ("torch_adam", "adam_w_mode", "fused")
    params = get(config, "optimizer.params", {})
    if not isinstance(params, dict):
        return [f"optimizer.params: {show(params)} is not an object; remove it"]
    found = [
        f"optimizer.params.{key}: {show(value)} is not available; remove it"
        for key, value in params.items()
        if key not in ignored and (key, value) not in (("amsgrad", False), ("bias_correction", True))
    ]
    return found + [f"optimizer.params.{message}" for message in value_problems(values_in(config))]


def name_in(config: dict) -> str | None:
    """Return which of our optimizers the section asks for; None where there is none, or it is not available."""
    return _TYPES.get(str(get(config, "optimizer.type")).lower())


def value_problems(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with values of AdamW, `<name>: <value> <why>` each; a name that is absent is not judged."""
    found = []
    for name in ("lr", "eps", "weight_decay"):
        value = values.get(name, 0.0)
        if not _is_number(value) or value < 0:
            found.append(f"{name}: {show(value)} is not a number >= 0; correct it")
    betas = values.get("betas", (0.0, 0.0))
    if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in betas):
        found.append(f"betas: {show(betas)} are not two numbers in [0, 1); use for instance [0.9, 0.999]")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def values_in(config: dict) -> dict[str, Any]:
    """Return what the `optimizer` section of a configuration without problems says of lr, betas, eps, weight_decay."""
    given = {key: get(config, f"optimizer.params.{key}") for key in ("lr", "betas", "eps", "weight_decay")}
    return {key: value for key, value in given.items() if value not in (ABSENT, AUTO, None)}

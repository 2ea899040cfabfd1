"""The DeepSpeed configuration: read it, and say what ReLoRA cannot run with.

"auto" follows the Hugging Face convention: the caller decides. A value that is given and differs from the caller's is
an error, never overruled in silence, and the message calls it what the caller does (`RECIPE_NAMES`, `ARGUMENT_NAMES`).
Pure functions of a dict; DeepSpeed is not imported. `ds_resolve` fills in the "auto" values.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora_ds.config import DS_CONFIG_DIR, ds_config_names
from relora_ds.config.rules import nearest
from relora_ds.zero import ds_adamw as adamw
from relora_ds.zero.ds_keys import (
    ABSENT,
    AUTO,
    REFUSED,
    SECTIONS,
    SECTIONS_WITH_AUTO,
    TOP_LEVEL_AUTOS,
    TOP_LEVEL_KEYS,
    ZERO_KEYS,
    get,
    show,
)

# What those who give a DeepSpeed configuration call it and the values beside it.
RECIPE_NAMES = {
    "config": "deepspeed",
    "precision": "precision",
    "micro_batch_size": "train.micro_batch_size",
    "batch_size": "the recipe's batch of",
    "accumulation": "the recipe's accumulation",
    "max_grad_norm": "optim.max_grad_norm",
    "optimizer": "optim.name",
    "lr": "optim.lr",
    "betas": "optim.betas",
    "eps": "optim.eps",
    "weight_decay": "optim.weight_decay",
}
ARGUMENT_NAMES = {
    **{name: name for name in RECIPE_NAMES},
    "accumulation": "gradient_accumulation_steps",
}


def load(config: str | Path | dict, name: str = "deepspeed") -> dict[str, Any]:
    """Return the configuration as a dict of its own: from a shipped name (`zero1`), a JSON file, or a dict.

    Args:
        name: what the caller calls it, for messages.

    Raises:
        ValueError: there is no such name or file, or it holds no JSON object (also for a key given twice).
    """
    if isinstance(config, dict):
        return copy.deepcopy(config)
    path = Path(config).expanduser()
    if not path.is_file():
        if str(config) not in ds_config_names():
            raise ValueError(
                f"{name}: {config} is neither a file nor a shipped configuration"
                f"{nearest(path.stem, ds_config_names())}; shipped: {', '.join(ds_config_names())}"
            )
        path = DS_CONFIG_DIR / f"{config}.json"
    try:
        settings = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be read ({error.strerror}); name a file that can") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {path} is not valid JSON ({error}); correct the file") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name}: {path} holds a {type(settings).__name__}, not an object; correct the file")
    return settings


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key given twice: {', '.join(sorted(key for key in found if keys.count(key) > 1))}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def precision_of(config: dict) -> str | None:
    """Return the precision that the configuration itself demands: bf16, fp16, fp32, or None where it leaves it open."""
    enabled = {name: get(config, f"{key}.enabled") for name, key in _precision_sections(config).items()}
    for name, value in enabled.items():
        if value is True:
            return name
    return "fp32" if enabled and all(value is False for value in enabled.values()) else None


def _precision_sections(config: dict) -> dict[str, str]:
    """{precision: its section's key}, of the sections that are there. `bfloat16` is the old name of `bf16`."""
    keys = {"bf16": "bf16" if "bf16" in config else "bfloat16", "fp16": "fp16"}
    return {name: key for name, key in keys.items() if key in config}


def problems(
    config: dict,
    *,
    precision: str | None = None,
    micro_batch_size: int | None = None,
    accumulation: int | None = None,
    max_grad_norm: float | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    batch_size: int | None = None,
    names: Mapping[str, str] = RECIPE_NAMES,
) -> list[str]:
    """Return everything in `config` that is not supported, or contradicts the arguments (None = not compared).

    One line each: `<names["config"]> <key>: <value> <why>; <remedy>`. [] when it can run.
    """
    expected = {
        "train_micro_batch_size_per_gpu": ("micro_batch_size", micro_batch_size),
        "train_batch_size": ("batch_size", batch_size),
        "gradient_accumulation_steps": ("accumulation", accumulation),
        "gradient_clipping": ("max_grad_norm", max_grad_norm),
        "optimizer.params.lr": ("lr", lr),
        "optimizer.params.betas": ("betas", None if betas is None else list(betas)),
        "optimizer.params.eps": ("eps", eps),
        "optimizer.params.weight_decay": ("weight_decay", weight_decay),
    }
    found = [
        *_key_problems(config),
        *_refused(config),
        *_precision_problems(config, precision, names["precision"]),
        *_zero_problems(config),
        *adamw.problems(config),
        *_optimizer_problems(config, optimizer, names["optimizer"]),
        *_conflicts(config, {key: (names[name], wanted) for key, (name, wanted) in expected.items()}),
    ]
    return [f"{names['config']} {message}" for message in found]


def _key_problems(config: dict) -> list[str]:
    found = []
    refused_top_level = {key for key in REFUSED if "." not in key}
    for key, value in config.items():
        if key not in TOP_LEVEL_KEYS and key not in refused_top_level:
            found.append(f"{key}: unknown key{nearest(key, TOP_LEVEL_KEYS)}; remove it")
        elif value == AUTO and key not in TOP_LEVEL_AUTOS and key not in refused_top_level:
            found.append(f'{key}: "auto", but nothing fills it in; give a value, or remove it')
        elif key in SECTIONS and not isinstance(value, dict):
            found.append(f"{key}: {show(value)} is not an object; use e.g. {SECTIONS[key]}")
    zero = config.get("zero_optimization")
    for key in zero if isinstance(zero, dict) else ():
        if key not in ZERO_KEYS and f"zero_optimization.{key}" not in REFUSED:
            found.append(f"zero_optimization.{key}: unknown key{nearest(key, ZERO_KEYS)}; remove it")
    return found


def _refused(config: dict) -> list[str]:
    found = []
    for key, (harmless, why) in REFUSED.items():
        value = get(config, key)
        dropped = value == AUTO and key.partition(".")[0] in SECTIONS_WITH_AUTO
        if value is not ABSENT and not dropped and value not in harmless:
            found.append(f"{key}: {show(value)}, but {why}")
    return found


def _precision_problems(config: dict, precision: str | None, name: str) -> list[str]:
    found = []
    enabled = {name: get(config, f"{key}.enabled") for name, key in _precision_sections(config).items()}
    if enabled.get("bf16") is True and enabled.get("fp16") is True:
        found.append('bf16.enabled, fp16.enabled: both true; keep one, or use "auto" for both')
    for kind, value in enabled.items():
        if precision is not None and value not in (AUTO, ABSENT, precision == kind):
            found.append(f'{kind}.enabled: {show(value)} contradicts {name} {precision}; use "auto", or change {name}')
    in_fp16 = precision == "fp16" or (precision is None and enabled.get("fp16") is True)
    if in_fp16 and get(config, "zero_optimization.stage", 0) == 0:
        found.append(
            "fp16.enabled: true at stage 0, where DeepSpeed 0.19 divides gradients by a loss scale that its "
            "backward did not multiply by; use stage 1"
        )
    if "bf16" in config and "bfloat16" in config:
        found.append("bfloat16: the old name of bf16, which is there too; remove it")
    return found


def _zero_problems(config: dict) -> list[str]:
    found = []
    stage = get(config, "zero_optimization.stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        found.append(f"zero_optimization.stage: {stage!r} is not a stage; use 0, 1, 2 or 3")
        return found
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = get(config, f"zero_optimization.{key}.device", "none")
        if device == "nvme":
            found.append(f"zero_optimization.{key}.device: nvme is not supported; use cpu")
        elif device not in ("none", "cpu", AUTO):
            found.append(f"zero_optimization.{key}.device: {device!r} is unknown; use cpu or none")
        elif device == "cpu" and stage < least:
            found.append(
                f"zero_optimization.{key}.device: cpu has no effect at stage {stage}; use "
                f"{'a higher stage' if least == 1 else 'stage 3'}, or remove it"
            )
    return found


def _optimizer_problems(config: dict, optimizer: str | None, name: str) -> list[str]:
    found, given = [], adamw.name_in(config)
    if optimizer is not None and given not in (None, optimizer):
        found.append(
            f"optimizer.type: {show(get(config, 'optimizer.type'))} contradicts {name} {optimizer}; remove it, or make "
            "them equal"
        )
    if (optimizer or given) == "adamw_8bit" and get(config, "zero_force_ds_cpu_optimizer") is True:
        found.append(
            "zero_force_ds_cpu_optimizer: true asks for DeepSpeed's CPU Adam, whose moments are in fp32; remove it, or "
            f"use adamw as {name}"
        )
    return found


def _conflicts(config: dict, expected: dict[str, tuple[str, object]]) -> list[str]:
    found = []
    for key, (name, wanted) in expected.items():
        given = get(config, key)
        if isinstance(given, tuple):
            given = list(given)  # a dict that Python wrote
        if wanted is not None and given not in (ABSENT, AUTO, None, wanted):
            found.append(f'{key}: {show(given)} contradicts {name} {wanted}; use "auto", or make them equal')
    return found

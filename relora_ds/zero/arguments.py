"""The arguments of `initialize`: what goes together, and what is wrong with them, before anything is built."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from relora_ds.config import ReLoRAConfig, fields
from relora_ds.config.curve import ScheduleConfig
from relora_ds.config.switch_config import SwitchLoRAConfig
from relora_ds.lowrank.base_format import Packed
from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.formats import format_of
from relora_ds.lowrank.inventory import lowrank_layers, owned_layers
from relora_ds.lowrank.storage import is_sharded
from relora_ds.lowrank.targets import summary
from relora_ds.matrix.factored import FactoredOptimizer
from relora_ds.matrix.optimizer import MatrixOptimizer
from relora_ds.zero import ds_adamw, optimizers
from relora_ds.zero.ds_config import ARGUMENT_NAMES


def carried_config(model: nn.Module, relora: ReLoRAConfig | None) -> ReLoRAConfig | None:
    """Return the config that a model was wrapped with; ValueError where `relora`, or the lack of both, contradicts."""
    carried = getattr(model, "relora_config", None)
    if not owned_layers(model):
        if relora is not None:
            raise ValueError("relora: given, but the model has no low-rank layers; call relora_ds.wrap(model, config)")
        return None
    if carried is None and relora is None:
        raise ValueError("relora: the model is wrapped; pass the ReLoRAConfig that it was wrapped with")
    if carried is not None and relora is not None and carried != relora:
        raise ValueError(f"relora: {_differences(carried, relora)}; leave it out, the model carries its config")
    return carried if relora is None else relora


def _differences(carried: ReLoRAConfig, other: ReLoRAConfig) -> str:
    """Return what two configs say differently, as a part of a sentence."""
    now = dataclasses.asdict(other)
    return ", ".join(
        f"{name} is {now.get(name)!r}, and {value!r} in the config that the model was wrapped with"
        for name, value in dataclasses.asdict(carried).items()
        if now.get(name) != value
    )


def by_layer(
    optimizer: MatrixOptimizer | Mapping[str, MatrixOptimizer] | None, model: nn.Module
) -> Mapping[str, MatrixOptimizer]:
    """Return the optimizer of each layer of a model."""
    if isinstance(optimizer, MatrixOptimizer):
        return dict.fromkeys(owned_layers(model), optimizer)
    return optimizer or {}


def matrix_problems(
    optimizer: Any, chosen: Mapping[str, MatrixOptimizer], lr: float | None, model: nn.Module, is_island: bool
) -> list[str]:
    """Return why owners cannot update the weights as they are asked to, one message each."""
    whole = [name for name, layer in owned_layers(model).items() if not isinstance(layer, LowRankLayer)]
    if optimizer is None and whole:
        return ["matrix_optimizer: not given, and the model is wrapped with trains='none'; pass e.g. relora_ds.Muon()"]
    if optimizer is None:
        return [] if lr is None else [f"matrix_lr: {lr} has no effect without matrix_optimizer; leave it out"]
    if not whole:
        return ["matrix_optimizer: given, but the model has no weights for it; wrap it with trains='none'"]
    found = []
    if lr is not None and not 0 < lr < math.inf:
        found.append(f"matrix_lr: {lr} is not above 0; use for instance 1e-2, or None for lr")
    if missing := [name for name in whole if name not in chosen]:
        found.append(f"matrix_optimizer: {summary(missing)} has none; name every layer, or pass one for all")
    if unknown := [name for name in chosen if name not in whole]:
        found.append(f"matrix_optimizer: {summary(unknown)} is no layer with trains='none'; leave it out")
    if is_island:
        found.append(
            "islands: owners' updates of whole weights are not exchanged; leave out islands or matrix_optimizer"
        )
    return found


def rule_problems(chosen: Mapping[str, MatrixOptimizer], weight_decay: Any, model: nn.Module) -> list[str]:
    """Return what rules cannot do with the weights that they are for, one message each."""
    found, layers = [], owned_layers(model)
    if weight_decay and (rule := next((rule for rule in chosen.values() if not rule.takes_weight_decay), None)):
        found.append(
            f"weight_decay: {weight_decay} is not supported with {type(rule).__name__}, whose factors alone change a "
            "weight; use 0.0, or another matrix_optimizer"
        )
    factored = {type(rule).__name__ for rule in chosen.values() if isinstance(rule, FactoredOptimizer)}
    if factored and not all(isinstance(rule, FactoredOptimizer) for rule in chosen.values()):
        found.append(
            f"matrix_optimizer: {' and '.join(sorted(factored))}, of which factors are sent, is for all layers or for "
            "none; pass it alone, or leave it out"
        )
    stacked = [name for name, rule in chosen.items() if name in layers and layers[name].experts]
    if wrong := [name for name in stacked if not chosen[name].takes_experts]:
        found.append(
            f"matrix_optimizer: {summary(wrong)} has a matrix for each expert, which {type(chosen[wrong[0]]).__name__} "
            "does not take; leave it out of target_parameters"
        )
    return found


def switching_problems(
    switching: SwitchLoRAConfig | None,
    model: nn.Module,
    optimizer: str,
    weight_decay: float,
    settings: dict,
    is_island: bool,
) -> list[str]:
    """Return why vectors of A and B cannot be switched, one message each."""
    if switching is None:
        return []
    layers = lowrank_layers(model)
    relora: ReLoRAConfig | None = getattr(model, "relora_config", None)
    if not layers or relora is None:
        return ["switching: given, but the model has no low-rank layers; call relora_ds.wrap(model, config)"]
    found = [*fields.problems(switching, "switching.")]
    if relora.trains != "both":
        found.append(f"relora.trains: {relora.trains} has no rows of A to switch; use both, or leave out switching")
    if relora.frozen_dtype != "fp32":
        found.append(f"relora.frozen_dtype: {relora.frozen_dtype} may round W at every switch; use fp32")
    for name in ("restart_every", "lora_dropout"):
        if value := getattr(relora, name):
            off = "None" if name == "restart_every" else "0"
            found.append(f"relora.{name}: {value} does not go with switching, which keeps the function; use {off}")
    if names := [name for name, layer in layers.items() if layer.experts or layer.weight is None]:
        found.append(
            f"relora.target_parameters: {summary(names)} has experts in one parameter, or no W, and switching is for "
            "matrices; leave it out, or leave out switching"
        )
    if optimizer != "adamw":
        found.append(f"optimizer: {optimizer} keeps no step count for each vector; use adamw with switching")
    if weight_decay:
        found.append(f"weight_decay: {weight_decay} of B would have to act on W too, which switching does not; use 0")
    zero = settings.get("zero_optimization") or {}
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device", "none") != "none":
            found.append(f"{ARGUMENT_NAMES['config']}: {name} does not go with switching; leave it out")
    if is_island:
        found.append("islands: switches are not exchanged; leave out islands or switching")
    return found


def switching_partition_problems(
    model: nn.Module, relora: ReLoRAConfig, precision: str, stage: int, ranks: int
) -> list[str]:
    """Return why ZeRO-3's pieces of W could not be added to: a number of four bytes would lie on two ranks."""
    format = format_of(relora.frozen_dtype, precision)
    if not is_sharded(relora, stage) or not isinstance(format, Packed):
        return []
    layers = owned_layers(model).items()
    cut = [name for name, layer in layers if -(-format.num_bytes(layer.weight_shape) // ranks) % torch.float32.itemsize]
    if not cut:
        return []
    return [
        f"relora.frozen_placement: {relora.frozen_placement} cuts {summary(cut)} within a number on {ranks} ranks; use "
        "replicated, or another number of ranks"
    ]


def argument_problems(passed: dict[str, Any], optimizer: str | None, settings: dict) -> list[str]:
    """Return what is wrong with the optimizer and the values of it that were passed, one message each."""
    found = ds_adamw.value_problems(given(passed))
    if optimizer is not None and optimizer not in optimizers.NAMES:
        found.append(f"optimizer: {optimizer!r} is not available; use {' or '.join(map(repr, optimizers.NAMES))}")
    elif reason := optimizers.unavailable(optimizer or ds_adamw.name_in(settings) or "adamw"):
        found.append(f"optimizer: {reason}")
    if passed["lr"] is None and "lr" not in ds_adamw.values_in(settings):
        found.append("lr: not given, and config has no optimizer.params.lr; pass for instance lr=1e-3")
    return found


def schedule_problems(curve: ScheduleConfig) -> list[str]:
    """Return what is wrong with the arguments that make the learning-rate curve, one message each."""
    found = []
    if curve.total_steps < 1:
        found.append(f"total_steps: {curve.total_steps} is not a number of steps; use 1 or more")
    if curve.warmup_steps < 0:
        found.append(f"warmup_steps: {curve.warmup_steps} is below 0; use 0 for no warm-up")
    if not 0 <= curve.min_lr_ratio <= 1:
        found.append(f"min_lr_ratio: {curve.min_lr_ratio} is not between 0 and 1; use for instance 0.1")
    if curve.decay_steps is not None and curve.decay_steps < 1:
        found.append(f"decay_steps: {curve.decay_steps} is not a number of steps; use 1 or more, or None")
    elif curve.decay_steps is not None and curve.schedule != "wsd":
        found.append(f"decay_steps: {curve.decay_steps} has no effect with schedule {curve.schedule}; leave it out")
    return found or [problem for problem in [curve.problem()] if problem]


def given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}

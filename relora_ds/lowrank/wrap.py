"""Put low-rank layers into a model, take them out again, and decide what trains.

A model is: targets (linears and parameters that get a frozen weight and a low-rank update), what trains at full rank
beside them (`trainable_modules`: by default embeddings, head and norms), and the rest, which is frozen.
"""

import copy
import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.attribute import install, uninstall
from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.inventory import (
    count_parameters,
    full_shape,
    is_lora_parameter,
    lowrank_layers,
    owned_layers,
    parameter_groups,
    plain_parameters,
    print_trainable_parameters,
)
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.owned_embedding import OwnedEmbedding
from relora_ds.lowrank.owned_layer import OwnedLayer
from relora_ds.lowrank.owned_linear import OwnedLinear
from relora_ds.lowrank.owned_parameter import OwnedParameter
from relora_ds.lowrank.parameter import ReLoRAParameter
from relora_ds.lowrank.peculiarities import is_conv1d
from relora_ds.lowrank.problems import problems, warnings
from relora_ds.lowrank.targets import ParameterPlace, find_targets, replace_modules, target_linears, trained_whole
from relora_ds.lowrank.ties import align_tie_flag
from relora_ds.lowrank.words import in_python

__all__ = [
    "count_parameters",
    "full_shape",
    "is_lora_parameter",
    "lowrank_layers",
    "merge_and_unwrap",
    "owned_layers",
    "parameter_groups",
    "plain_parameters",
    "print_trainable_parameters",
    "problems",
    "target_linears",
    "unwrap",
    "warnings",
    "wrap",
    "wrap_quietly",
]

logger = logging.getLogger(__name__)


def wrap(model: nn.Module, config: ReLoRAConfig, *, seed: int = 0, base: bool = True) -> nn.Module:
    """Replace the target linears and parameters by low-rank layers, in place, and freeze what does not train.

    The model then carries its config, as PEFT's do: `model.relora_config` and `model.print_trainable_parameters()`.

    Args:
        model: a model on CPU or meta, or partitioned by ZeRO-3, in the precision that its masters shall have (fp32).
        config: which targets, rank and scaling; see `ReLoRAConfig`.
        seed: with the module names, decides the values of `lora_A`.
        base: False drops the frozen weights: `y = s·B·A·x`, the paper's LoRA baseline.

    Returns:
        The same model. Its `config.tie_word_embeddings` agrees with its parameters, see `ties.align_tie_flag`.

    Raises:
        ValueError: every problem at once: targets that match nothing or are no linears or matrices, a rank above
            a target's smaller side, a weight that `frozen_dtype` cannot store or that is shared with another module,
            a target that computes something else than a linear or is not called, a model wrapped before.
    """
    if found := problems(model, config, base=base):
        raise ValueError("\n".join(in_python(message) for message in found))
    if changed := align_tie_flag(model):
        logger.warning(changed)
    for warning in warnings(model, config):
        logger.warning(in_python(warning))
    return wrap_quietly(model, config, seed=seed, base=base)


def wrap_quietly(model: nn.Module, config: ReLoRAConfig, *, seed: int = 0, base: bool = True) -> nn.Module:
    """Wrap a model as `wrap` does, without its warnings, for callers that show `warnings` themselves."""
    found = problems(model, config, base=base)
    if found:
        raise ValueError("\n".join(found))
    targets = find_targets(model, config)
    filled = {name for name, weight in targets.weights.items() if _has_values(weight)}
    linears: dict[str, nn.Module] = {}
    layers: dict[str, OwnedLayer] = {}
    for name, linear in targets.linears.items():
        layers[name] = linears[name] = (
            OwnedEmbedding(linear) if isinstance(linear, nn.Embedding) else _wrapped_linear(linear, config, base)
        )
    replace_modules(model, linears)
    for name, place in targets.parameters.items():
        layers[name] = wrapped = _wrapped_parameter(place, config, base)
        install(place.module, place.leaf, wrapped)
    for name, layer in layers.items():
        if isinstance(layer, LowRankLayer):
            layer.initial_seed = None if name in filled else seed
            _initialise(layer, name, seed)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fast path in evaluation, which reads weights instead of calling
    _choose_what_trains(model, config)
    _carry(model, config)
    return model


def unwrap(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Put the plain linears and parameters back, with the given merged weights by layer name; in place."""
    linears: dict[str, nn.Module] = {}
    for name, layer in owned_layers(model).items():
        weight = nn.Parameter(weights[name])
        if isinstance(layer, OwnedEmbedding):
            linears[name] = layer.plain()
            linears[name].register_parameter("weight", weight)
        elif isinstance(layer, (ReLoRALinear, OwnedLinear)):
            linears[name] = linear = _plain_linear(layer)
            linear.register_parameter("weight", weight)
            linear.register_parameter("bias", layer.bias)
        else:
            parent, _, leaf = name.rpartition(".")
            uninstall(model.get_submodule(parent), leaf, weight)
    replace_modules(model, linears)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for name in ("save_pretrained", "relora_config", "print_trainable_parameters"):
        vars(model).pop(name, None)
    return model


def _wrapped_linear(linear: nn.Module, config: ReLoRAConfig, base: bool) -> ReLoRALinear | OwnedLinear:
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    assert weight is not None
    transposed = is_conv1d(linear)
    rows, columns = full_shape(weight)  # a subclass may call them otherwise
    in_features, out_features = (rows, columns) if transposed else (columns, rows)
    if config.trains == "none":
        return OwnedLinear(in_features, out_features, weight, bias, transposed=transposed)
    return ReLoRALinear(
        in_features,
        out_features,
        weight if base else None,
        bias,
        lora_dropout=config.lora_dropout,
        product=config.product,
        transposed=transposed,
        **_options(config, weight),
    )


def _wrapped_parameter(place: ParameterPlace, config: ReLoRAConfig, base: bool) -> ReLoRAParameter | OwnedParameter:
    weight, shape = place.parameter, full_shape(place.parameter)
    if config.trains == "none":
        return OwnedParameter(shape, weight, transposed=place.transposed)
    options = _options(config, weight)
    return ReLoRAParameter(shape, weight if base else None, transposed=place.transposed, **options)


def _plain_linear(layer: ReLoRALinear | OwnedLinear) -> nn.Module:
    """Return the kind of module that a layer replaced, without values."""
    if not layer.transposed:
        return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 (the model has brought it)

    with torch.device("meta"):
        return Conv1D(layer.out_features, layer.in_features)


def _options(config: ReLoRAConfig, weight: nn.Parameter) -> dict:
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "one_sided": config.trains == "B",
        "dtype": weight.dtype,
        "device": weight.device,
    }


def merge_and_unwrap(model: nn.Module) -> nn.Module:
    """Merge every `s·B·A` into its weight and restore the plain linears: PEFT's `merge_and_unload`.

    Single process, in place, in the precision of the parameters; an engine's `save_merged` does the same
    from the fp32 masters of all ranks.

    Args:
        model: one that `wrap` has wrapped, with whole weights.

    Returns:
        The same model, plain again: it saves itself and carries no config.

    Raises:
        ValueError: the model has no low-rank layers.
    """
    layers = owned_layers(model)
    if not layers:
        raise ValueError("model: it has no low-rank layers to merge; it is plain, or was merged already")
    return unwrap(model, {name: layer.merged_weight().to(layer.dtype) for name, layer in layers.items()})


def _refuse_to_save(*args, **kwargs) -> None:
    """Refuse a wrapped model's `save_pretrained`, whose files `from_pretrained` would load without A and B."""
    raise ValueError(
        "save_pretrained: the model is wrapped, and its low-rank updates would be dropped when it is "
        "loaded; use engine.save_merged, ReLoRACallback with the Hugging Face Trainer, or "
        "relora_ds.merge_and_unwrap in a single process"
    )


def _carry(model: Any, config: ReLoRAConfig) -> None:
    """Let a wrapped model have its config and what PEFT's models can; `copy.deepcopy` and pickle take them along."""
    model.relora_config = copy.deepcopy(config)
    model.print_trainable_parameters = functools.partial(print_trainable_parameters, model)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save


def _initialise(layer: LowRankLayer, name: str, seed: int) -> None:
    if not _has_values(layer.lora_A):
        return
    with torch.no_grad():
        layer.lora_A.copy_(layer.initial_A(name, seed=seed, restart=0))
        layer.lora_B.copy_(layer.initial_B(name, seed=seed))


def _has_values(parameter: nn.Parameter) -> bool:
    """Return whether it is here as a whole: neither on the meta device nor partitioned by ZeRO-3."""
    return not parameter.is_meta and parameter.shape == full_shape(parameter)


def _choose_what_trains(model: nn.Module, config: ReLoRAConfig) -> None:
    chosen = trained_whole(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    for layer in owned_layers(model).values():
        is_one_sided = isinstance(layer, LowRankLayer) and layer.one_sided
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(name != "weight" and not (name == "lora_A" and is_one_sided))
        if layer.weight is not None:  # a pattern may have named a parent of wrapped layers
            layer.weight.requires_grad_(False)

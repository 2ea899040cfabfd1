"""Put ReLoRALinear into a model, take it out again, and decide what trains.

A model is: targets (linears that get a frozen weight and a low-rank update), what trains at full rank
beside them (`trainable_modules`: by default embeddings, head and norms), and the rest, which is frozen.
"""

import logging
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.formats import DENSE, format_of
from relora_ds.lowrank.linear import ReLoRALinear, initial_A, initial_B
from relora_ds.lowrank.storage import shape_problems

logger = logging.getLogger(__name__)

DEFAULT_TRAINABLE_MODULES = ("embeddings", "head", "norms")


def lowrank_layers(model: nn.Module) -> dict[str, ReLoRALinear]:
    """The wrapped layers by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ReLoRALinear)}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """`(trainable, all)` weights; shared parameters count once.

    However they are kept: partitioned by ZeRO-3, packed into bytes, or as a buffer, a weight is one weight.
    """
    layers = [layer for layer in lowrank_layers(model).values() if layer.weight is not None]
    stored = {id(layer.weight) for layer in layers}
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in model.parameters() if id(p) not in stored]
    frozen = sum(layer.weight_shape.numel() for layer in layers)
    return sum(n for trains, n in sizes if trains), sum(n for _, n in sizes) + frozen


def wrap(model: nn.Module, config: ReLoRAConfig, *, seed: int = 0, base: bool = True) -> nn.Module:
    """Replace the target linears by `ReLoRALinear`, in place, and freeze what does not train.

    Args:
        model: a model on CPU or meta, in the precision that its masters shall have (fp32).
        config: which linears, rank and scaling; see `ReLoRAConfig`.
        seed: with the module names, decides the values of `lora_A`.
        base: False drops the frozen weights: `y = s·B·A·x`, the paper's LoRA baseline.

    Returns:
        The same model.

    Raises:
        ValueError: every problem at once: targets that match nothing or are no `nn.Linear`, a rank above
            a target's smaller side, a weight that `frozen_dtype` cannot store or that is shared with another module,
            a model wrapped before.
    """
    found = problems(model, config, base=base)
    if found:
        raise ValueError("\n".join(found))
    targets = target_linears(model, config)
    for name, linear in targets.items():
        layer = ReLoRALinear(
            linear.in_features, linear.out_features, linear.weight if base else None, linear.bias,
            r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
            dtype=linear.weight.dtype, device=linear.weight.device)
        _initialise(layer, name, seed, base)
        _replace(model, name, layer)
    _choose_what_trains(model, config)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save
    return model


def unwrap(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Put plain `nn.Linear`s back, with the given merged weights `{module name: [out, in]}`; in place."""
    for name, layer in lowrank_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weights[name])
        linear.bias = layer.bias
        _replace(model, name, linear)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    vars(model).pop("save_pretrained", None)
    return model


def merge_and_unwrap(model: nn.Module) -> nn.Module:
    """Merge every `s·B·A` into its weight and restore the plain linears: PEFT's `merge_and_unload`.

    Single process, in place, in the precision of the parameters; an engine's `save_merged` does the same
    from the fp32 masters of all ranks.
    """
    return unwrap(model, {name: layer.merged_weight().to(layer.lora_A.dtype)
                          for name, layer in lowrank_layers(model).items()})


def target_linears(model: nn.Module, config: ReLoRAConfig) -> dict[str, nn.Linear]:
    """The linears that `target_modules` names. "all-linear" is every `nn.Linear` but the output head (PEFT's rule)."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if config.target_modules == "all-linear":
        head = _output_head(model)
        return {name: module for name, module in linears.items() if module is not head}
    return {name: module for name, module in linears.items() if _matches(name, _as_list(config.target_modules))}


def problems(model: nn.Module, config: ReLoRAConfig, *, base: bool = True) -> list[str]:
    """Everything that keeps `config` from being applied to `model` (which may be on meta), one message each.

    base: whether there will be frozen weights.
    """
    found = list(config.problems())
    format = format_of(config.frozen_dtype, "fp32") if base and not found else DENSE
    if lowrank_layers(model):
        found.append("model: it is wrapped already; wrap a fresh model, or merge_and_unwrap it first")
    targets = target_linears(model, config)
    wanted = _as_list(config.target_modules)
    if config.target_modules == "all-linear":
        others = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_conv1d(module)})
    else:
        others = sorted(name for name, module in model.named_modules()
                        if _is_conv1d(module) and _matches(name, wanted))
        for pattern in wanted:
            if not any(_matches(name, [pattern]) for name, _ in model.named_modules()):
                found.append(f"relora.target_modules: {pattern!r} matches no module; the model's linears are "
                             f"{', '.join(_linear_suffixes(model)) or 'none'}")
            elif not any(_matches(name, [pattern]) for name in targets) and not others:
                found.append(f"relora.target_modules: {pattern!r} matches no nn.Linear; name the linears themselves")
    if others:
        found.append(f"relora.target_modules: the projections {', '.join(others)} are transformers' Conv1D (GPT-2's), "
                     "not nn.Linear; relora_ds wraps nn.Linear only: choose a model family that uses it")
    elif not targets and config.target_modules == "all-linear":
        found.append("relora.target_modules: 'all-linear' matches nothing: the model has no nn.Linear beside its head")
    for name, linear in targets.items():
        smaller = min(linear.in_features, linear.out_features)
        if config.r > smaller:
            found.append(f"relora.r: {config.r} exceeds the smaller side of {name} "
                         f"({linear.out_features}x{linear.in_features}); use r <= {smaller}")
    found += shape_problems({name: linear.weight.shape for name, linear in targets.items()}, format)
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, linear in targets.items():
        if uses[id(linear.weight)] > 1:
            found.append(f"relora.target_modules: the weight of {name} is shared with another module and cannot be "
                         "frozen and merged for one of them; leave it out")
    for pattern in _as_list(config.trainable_modules):
        if pattern not in DEFAULT_TRAINABLE_MODULES and \
                not any(_matches(name, [pattern]) for name, _ in model.named_modules()):
            found.append(f"relora.trainable_modules: {pattern!r} matches no module; use module names or "
                         f"{', '.join(DEFAULT_TRAINABLE_MODULES)}")
    return found


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict]:
    """Optimizer groups: LoRA factors, other matrices, and norms and biases (no weight decay).

    The LoRA factors have groups of their own because Adam's step is one scalar per ZeRO partition.
    Groups without parameters are left out (an empty one breaks DeepSpeed's scheduler).
    """
    members: dict[str, list[nn.Parameter]] = {"lora": [], "matrices": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter)].append(parameter)
    decay = {"lora": weight_decay, "matrices": weight_decay, "vectors": 0.0}
    return [{"name": group, "params": params, "weight_decay": decay[group]}
            for group, params in members.items() if params]


def is_lora_parameter(name: str) -> bool:
    """Whether a parameter's name is that of a low-rank factor."""
    return name.rsplit(".", 1)[-1] in ("lora_A", "lora_B")


def _refuse_to_save(*args, **kwargs) -> None:
    """In place of a wrapped model's `save_pretrained`, whose files `from_pretrained` would load without A and B."""
    raise ValueError("save_pretrained: the model is wrapped, and its low-rank updates would be dropped when it is "
                     "loaded; use engine.save_merged, ReLoRACallback with the Hugging Face Trainer, or "
                     "relora_ds.merge_and_unwrap in a single process")


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if is_lora_parameter(name):
        return "lora"
    return "matrices" if parameter.ndim >= 2 else "vectors"


def _initialise(layer: ReLoRALinear, name: str, seed: int, base: bool) -> None:
    if layer.lora_A.is_meta:
        return
    with torch.no_grad():
        layer.lora_A.copy_(initial_A(layer.r, layer.in_features, seed=seed, restart=0, name=name))
        if base:
            layer.lora_B.zero_()
        else:
            layer.lora_B.copy_(initial_B(layer.out_features, layer.r, seed=seed, name=name))


def _choose_what_trains(model: nn.Module, config: ReLoRAConfig) -> None:
    patterns = config.trainable_modules
    patterns = list(DEFAULT_TRAINABLE_MODULES) if patterns is None else _as_list(patterns)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in lowrank_layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(True)
    head = _output_head(model)
    for name, module in _outside_layers(model):
        kinds = {"embeddings": isinstance(module, nn.Embedding), "head": module is head,
                 "norms": "norm" in type(module).__name__.lower()}
        if _matches(name, patterns) or any(kinds.get(pattern, False) for pattern in patterns):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
    for layer in lowrank_layers(model).values():  # a pattern may have named a parent of wrapped layers
        if layer.weight is not None:
            layer.weight.requires_grad_(False)
    frozen = [name for name, module in _outside_layers(model)
              for p in module.parameters(recurse=False) if not p.requires_grad]
    if frozen and config.trainable_modules is None:
        logger.warning("frozen for good, because neither target_modules nor trainable_modules names them: %s",
                       ", ".join(frozen))


def _outside_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if not isinstance(module, ReLoRALinear))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _linear_suffixes(model: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})


def _as_list(names: str | list[str] | None) -> list[str]:
    if names is None:
        return []
    return [names] if isinstance(names, str) else list(names)


def _matches(name: str, patterns: list[str]) -> bool:
    """PEFT's rule: a pattern is a whole module name or its last components."""
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)

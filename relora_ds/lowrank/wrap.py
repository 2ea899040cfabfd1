"""Put ReLoRALinear into a model, take it out again, and decide what trains.

A model is: targets (linears that get a frozen weight and a low-rank update), what trains at full rank
beside them (`trainable_modules`: by default embeddings, head and norms), and the rest, which is frozen.
"""

import copy
import functools
import logging
from collections import Counter

import torch
from torch import Tensor, nn

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.formats import DENSE, format_of
from relora_ds.lowrank.linear import ReLoRALinear, initial_A, initial_B
from relora_ds.lowrank.storage import shape_problems
from relora_ds.lowrank.targets import (
    ALL_LINEAR,
    as_list,
    find_targets,
    generic,
    matches,
    named_places,
    output_head,
    replace_modules,
    summary,
)
from relora_ds.lowrank.ties import align_tie_flag
from relora_ds.lowrank.words import in_python

logger = logging.getLogger(__name__)

DEFAULT_TRAINABLE_MODULES = ("embeddings", "head", "norms")


def lowrank_layers(model: nn.Module) -> dict[str, ReLoRALinear]:
    """The wrapped layers by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ReLoRALinear)}


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape, also while ZeRO-3 has it partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """`(trainable, all)` weights; shared parameters count once.

    However they are kept: partitioned by ZeRO-3, packed into bytes, or as a buffer, a weight is one weight.
    """
    layers = [layer for layer in lowrank_layers(model).values() if layer.weight is not None]
    stored = {id(layer.weight) for layer in layers}
    sizes = [(p.requires_grad, full_shape(p).numel()) for p in model.parameters() if id(p) not in stored]
    frozen = sum(layer.weight_shape.numel() for layer in layers)
    return sum(n for trains, n in sizes if trains), sum(n for _, n in sizes) + frozen


def wrap(model: nn.Module, config: ReLoRAConfig, *, seed: int = 0, base: bool = True) -> nn.Module:
    """Replace the target linears by `ReLoRALinear`, in place, and freeze what does not train.

    The model then carries its config, as PEFT's do: `model.relora_config` and `model.print_trainable_parameters()`.

    Args:
        model: a model on CPU or meta, or partitioned by ZeRO-3, in the precision that its masters shall have (fp32).
        config: which linears, rank and scaling; see `ReLoRAConfig`.
        seed: with the module names, decides the values of `lora_A`.
        base: False drops the frozen weights: `y = s·B·A·x`, the paper's LoRA baseline.

    Returns:
        The same model. Its `config.tie_word_embeddings` agrees with its parameters, see `ties.align_tie_flag`.

    Raises:
        ValueError: every problem at once: targets that match nothing or are no `nn.Linear`, a rank above
            a target's smaller side, a weight that `frozen_dtype` cannot store or that is shared with another module,
            a target that computes something else than `nn.Linear` or is not called, a model wrapped before.
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
    layers = {}
    for name, linear in target_linears(model, config).items():
        rows, columns = full_shape(linear.weight)  # a subclass may call them otherwise
        layers[name] = layer = ReLoRALinear(
            columns,
            rows,
            linear.weight if base else None,
            linear.bias,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        layer.initial_seed = None if _has_values(linear.weight) else seed
        _initialise(layer, name, seed, base)
    replace_modules(model, layers)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fast path in evaluation, which reads weights instead of calling
    _choose_what_trains(model, config)
    _carry(model, config)
    return model


def unwrap(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Put plain `nn.Linear`s back, with the given merged weights `{module name: [out, in]}`; in place."""
    linears = {}
    for name, layer in lowrank_layers(model).items():
        linears[name] = linear = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(weights[name])
        linear.bias = layer.bias
    replace_modules(model, linears)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for name in ("save_pretrained", "relora_config", "print_trainable_parameters"):
        vars(model).pop(name, None)
    return model


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
    if not lowrank_layers(model):
        raise ValueError("model: it has no low-rank layers to merge; it is plain, or was merged already")
    return unwrap(
        model, {name: layer.merged_weight().to(layer.lora_A.dtype) for name, layer in lowrank_layers(model).items()}
    )


def target_linears(model: nn.Module, config: ReLoRAConfig) -> dict[str, nn.Linear]:
    """Return the linears that get a low-rank update, by their first name; see `targets.find_targets`."""
    return find_targets(model, config).linears


def problems(model: nn.Module, config: ReLoRAConfig, *, base: bool = True) -> list[str]:
    """Everything that keeps `config` from being applied to `model` (which may be on meta), one message each.

    base: whether there will be frozen weights.
    """
    found = list(config.problems())
    format = format_of(config.frozen_dtype, "fp32") if base and not found else DENSE
    if lowrank_layers(model):
        found.append("model: it is wrapped already; wrap a fresh model, or merge_and_unwrap it first")
    found_targets = find_targets(model, config)
    targets, unfit, excluded = found_targets.linears, found_targets.unfit, found_targets.excluded
    wanted, modules = as_list(config.target_modules), list(named_places(model))
    if config.target_modules == ALL_LINEAR:
        others = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_conv1d(module)})
    else:
        others = sorted(names[0] for names, module in modules if _is_conv1d(module) and matches(names, wanted))
        found += _unfit_problems(unfit)
        for pattern in wanted:
            if not any(matches(names, [pattern]) for names, _ in modules):
                found.append(
                    f"relora.target_modules: {pattern!r} matches no module; the model's linears are "
                    f"{', '.join(_linear_suffixes(model)) or 'none'}"
                )
            elif not others and not any(
                isinstance(module, nn.Linear) and matches(names, [pattern]) for names, module in modules
            ):
                found.append(f"relora.target_modules: {pattern!r} matches no nn.Linear; name the linears themselves")
    if others:
        found.append(
            f"relora.target_modules: the projections {', '.join(others)} are transformers' Conv1D (GPT-2's), "
            "not nn.Linear; relora_ds wraps nn.Linear only: choose a model family that uses it"
        )
    elif not targets and excluded:
        found.append(
            f"relora.exclude_modules: {config.exclude_modules} leaves nothing of relora.target_modules "
            f"{config.target_modules!r}; name fewer modules"
        )
    elif not targets and config.target_modules == ALL_LINEAR:
        found += _unfit_problems(unfit) or [
            "relora.target_modules: 'all-linear' matches nothing: the model has no nn.Linear beside its head"
        ]
    found += _rank_problems(targets, config)
    found += shape_problems({name: full_shape(linear.weight) for name, linear in targets.items()}, format)
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    if shared := [name for name, linear in targets.items() if uses[id(linear.weight)] > 1]:
        found.append(
            f"relora.target_modules: the weight of {summary(shared)} is shared with another module and cannot "
            "be frozen and merged for one of them; leave it out, for instance with "
            f"relora.exclude_modules=[{', '.join(_last_names(shared))}]"
        )
    for pattern in as_list(config.exclude_modules):
        if not any(matches(names, [pattern]) for names, _ in modules):
            found.append(
                f"relora.exclude_modules: {pattern!r} matches no module; the model's linears are "
                f"{', '.join(_linear_suffixes(model)) or 'none'}"
            )
    for pattern in as_list(config.trainable_modules):
        if pattern not in DEFAULT_TRAINABLE_MODULES and not any(matches(names, [pattern]) for names, _ in modules):
            found.append(
                f"relora.trainable_modules: {pattern!r} matches no module; use module names or "
                f"{', '.join(DEFAULT_TRAINABLE_MODULES)}"
            )
    return found


def _unfit_problems(unfit: dict[str, str]) -> list[str]:
    return [
        f"relora.target_modules: {text}; leave it out, for instance with {remedy}"
        for text, remedy in _unfit_texts(unfit)
    ]


def _unfit_texts(unfit: dict[str, str]) -> list[tuple[str, str]]:
    """Return for each reason that linears cannot be wrapped `(names and reason, the option that leaves them out)`."""
    reasons: dict[str, list[str]] = {}
    for name, reason in unfit.items():
        reasons.setdefault(reason, []).append(name)
    return [
        (f"{summary(names)} {reason}", f"relora.exclude_modules=[{', '.join(_last_names(names))}]")
        for reason, names in reasons.items()
    ]


def _last_names(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _rank_problems(targets: dict[str, nn.Linear], config: ReLoRAConfig) -> list[str]:
    """Return one message for the targets of each kind whose smaller side is below the rank."""
    small: dict[str, list[str]] = {}
    for name, linear in targets.items():
        if config.r > min(full_shape(linear.weight)):
            small.setdefault(generic(name), []).append(name)
    found = []
    for names in small.values():
        rows, columns = full_shape(targets[names[0]].weight)
        found.append(
            f"relora.r: {config.r} exceeds the smaller side of {summary(names)} ({rows}x{columns}); use "
            f"r <= {min(rows, columns)}, or leave it out with "
            f"relora.exclude_modules=[{', '.join(_last_names(names))}]"
        )
    return found


def warnings(model: nn.Module, config: ReLoRAConfig) -> list[str]:
    """Return what wrapping a plain model with a config that has no problems leaves out or does not do."""
    targets, found = find_targets(model, config), []
    if config.target_modules == ALL_LINEAR:
        found += [
            f"relora.target_modules: {text}. It is left out and gets no low-rank update; {remedy} says so"
            for text, remedy in _unfit_texts(targets.unfit)
        ]
    if config.exclude_modules and not targets.excluded:
        found.append(
            f"relora.exclude_modules: {config.exclude_modules} has no effect: relora.target_modules names none of them"
        )
    return found + _frozen_warning(model, config, targets.linears)


def _frozen_warning(model: nn.Module, config: ReLoRAConfig, targets: dict[str, nn.Linear]) -> list[str]:
    """Return a message on the parameters that have no low-rank update and do not train either."""
    weights = {id(linear.weight): name for name, linear in targets.items()}
    trains = weights.keys() | {id(linear.bias) for linear in targets.values()} | _trained_whole(model, config)
    frozen, sizes = {}, {}
    for names, module in named_places(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            sizes[id(parameter)] = full_shape(parameter).numel()
            if id(parameter) not in trains:
                frozen.setdefault(id(parameter), f"{names[0]}.{leaf}".removeprefix("."))
    if not frozen:
        return []
    share = 100 * sum(sizes[key] for key in frozen) / sum(sizes.values())
    return [
        f"{share:.3g} % of the parameters are frozen for good, because neither relora.target_modules nor "
        f"relora.trainable_modules names them: {summary(list(frozen.values()))}"
    ]


def _trained_whole(model: nn.Module, config: ReLoRAConfig) -> set[int]:
    """Return the ids of the parameters that `trainable_modules` names; a target's own weight may be among them."""
    patterns = config.trainable_modules
    patterns = list(DEFAULT_TRAINABLE_MODULES) if patterns is None else as_list(patterns)
    head, chosen = output_head(model), set()
    for names, module in named_places(model):
        if isinstance(module, ReLoRALinear):
            continue
        kinds = {
            "embeddings": isinstance(module, nn.Embedding),
            "head": module is head,
            "norms": "norm" in type(module).__name__.lower(),
        }
        if matches(names, patterns) or any(kinds.get(pattern, False) for pattern in patterns):
            chosen |= {id(parameter) for parameter in module.parameters()}
    return chosen


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
    return [
        {"name": group, "params": params, "weight_decay": decay[group]} for group, params in members.items() if params
    ]


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many weights train, in PEFT's words; a packed or partitioned weight counts as one weight each."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")


def is_lora_parameter(name: str) -> bool:
    """Whether a parameter's name is that of a low-rank factor."""
    return name.rsplit(".", 1)[-1] in ("lora_A", "lora_B")


def _refuse_to_save(*args, **kwargs) -> None:
    """In place of a wrapped model's `save_pretrained`, whose files `from_pretrained` would load without A and B."""
    raise ValueError(
        "save_pretrained: the model is wrapped, and its low-rank updates would be dropped when it is "
        "loaded; use engine.save_merged, ReLoRACallback with the Hugging Face Trainer, or "
        "relora_ds.merge_and_unwrap in a single process"
    )


def _carry(model: nn.Module, config: ReLoRAConfig) -> None:
    """Let a wrapped model have its config and what PEFT's models can; `copy.deepcopy` and pickle take them along."""
    model.relora_config = copy.deepcopy(config)
    model.print_trainable_parameters = functools.partial(print_trainable_parameters, model)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if is_lora_parameter(name):
        return "lora"
    return "matrices" if len(full_shape(parameter)) >= 2 else "vectors"


def _initialise(layer: ReLoRALinear, name: str, seed: int, base: bool) -> None:
    if not _has_values(layer.lora_A):
        return
    with torch.no_grad():
        layer.lora_A.copy_(initial_A(layer.r, layer.in_features, seed=seed, restart=0, name=name))
        if base:
            layer.lora_B.zero_()
        else:
            layer.lora_B.copy_(initial_B(layer.out_features, layer.r, seed=seed, name=name))


def _has_values(parameter: nn.Parameter) -> bool:
    """Whether it is here as a whole: neither on the meta device nor partitioned by ZeRO-3."""
    return not parameter.is_meta and parameter.shape == full_shape(parameter)


def _choose_what_trains(model: nn.Module, config: ReLoRAConfig) -> None:
    chosen = _trained_whole(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    for layer in lowrank_layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(True)
        if layer.weight is not None:  # a pattern may have named a parent of wrapped layers
            layer.weight.requires_grad_(False)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _linear_suffixes(model: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})

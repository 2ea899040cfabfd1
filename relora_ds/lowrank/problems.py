"""What is wrong with a configuration for a model, and what applying it leaves out."""

from collections import Counter

from torch import nn

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.formats import DENSE, format_of
from relora_ds.lowrank.inventory import full_shape, owned_layers
from relora_ds.lowrank.peculiarities import is_linear
from relora_ds.lowrank.storage import shape_problems
from relora_ds.lowrank.targets import (
    ALL_LINEAR,
    ALL_MATRICES,
    DEFAULT_TRAINABLE_MODULES,
    Targets,
    as_list,
    can_be_target,
    find_targets,
    generic,
    matches,
    named_places,
    summary,
    trained_whole,
)


def problems(model: nn.Module, config: ReLoRAConfig, *, base: bool = True) -> list[str]:
    """Return everything that keeps `config` from being applied to `model` (which may be on meta), one message each.

    base: whether there will be frozen weights.
    """
    found = list(config.problems())
    format = format_of(config.frozen_dtype, "fp32") if base and not found else DENSE
    if owned_layers(model):
        found.append("model: it is wrapped already; wrap a fresh model, or merge_and_unwrap it first")
    if config.target_modules == ALL_MATRICES and config.trains != "none":
        found.append(
            f"relora.target_modules: {ALL_MATRICES} has the head and the embedding, which get no low-rank update; use "
            f"{ALL_LINEAR}, or a method whose owners update whole weights, e.g. scale"
        )
    if config.trains == "B" and not base:
        found.append("relora.trains: B needs the frozen weights that lora.base none leaves out; use relora.trains=both")
    targets = find_targets(model, config)
    found += _module_problems(model, config, targets) + _parameter_problems(model, config, targets)
    if config.trains != "none":
        found += _rank_problems(targets, config)
    found += shape_problems({name: full_shape(weight) for name, weight in targets.weights.items()}, format)
    found += _shared_problems(model, targets)
    places = [names for names, _ in named_places(model)]
    for pattern in _patterns(config.exclude_modules):
        if not any(matches(names, pattern) for names in places):
            found.append(f"relora.exclude_modules: {_quoted(pattern)} matches no module; {_examples(model, pattern)}")
    for name in as_list(config.trainable_modules):
        if name not in DEFAULT_TRAINABLE_MODULES and not any(matches(names, [name]) for names in places):
            found.append(
                f"relora.trainable_modules: {name!r} matches no module; use module names or "
                f"{', '.join(DEFAULT_TRAINABLE_MODULES)}"
            )
    return found


def _patterns(patterns: str | list[str] | None) -> list[str | list[str]]:
    """Return what is to match something each: a regular expression, or the names of a list."""
    return [patterns] if isinstance(patterns, str) else [[pattern] for pattern in patterns or ()]


def _quoted(pattern: str | list[str]) -> str:
    return f"the regular expression {pattern!r}" if isinstance(pattern, str) else repr(pattern[0])


def _examples(model: nn.Module, pattern: str | list[str]) -> str:
    """Return names of linears that a pattern could match: whole ones for a regular expression, else their endings."""
    names = [names[0] for names, module in named_places(model) if is_linear(module)]
    if isinstance(pattern, str):
        return f"it is matched against whole names, such as {', '.join(names[:1] + names[-1:]) or 'none'}"
    return f"the model's linears are {', '.join(sorted({name.rsplit('.', 1)[-1] for name in names})) or 'none'}"


def _module_problems(model: nn.Module, config: ReLoRAConfig, targets: Targets) -> list[str]:
    found = []
    if config.target_modules in (ALL_LINEAR, ALL_MATRICES):
        if not targets.linears and not targets.excluded and not config.target_parameters:
            found += _unfit_problems(targets.unfit) or [
                f"relora.target_modules: '{config.target_modules}' matches nothing: the model has no linear beside its "
                "head"
            ]
    else:
        found += _unfit_problems(targets.unfit)
        for pattern in _patterns(config.target_modules):
            named = [module for names, module in named_places(model) if matches(names, pattern)]
            if not named:
                found.append(
                    f"relora.target_modules: {_quoted(pattern)} matches no module; {_examples(model, pattern)}"
                )
            elif not any(can_be_target(module, config) for module in named):
                found.append(
                    f"relora.target_modules: {_quoted(pattern)} matches no linear; {_examples(model, pattern)}"
                )
    if not (targets.linears or targets.parameters) and targets.excluded:
        found.append(
            f"relora.exclude_modules: {config.exclude_modules} leaves nothing of relora.target_modules "
            f"{config.target_modules!r}; name fewer modules"
        )
    return found


def _parameter_problems(model: nn.Module, config: ReLoRAConfig, targets: Targets) -> list[str]:
    found = [f"relora.target_parameters: {name} {reason}" for name, reason in targets.unfit_parameters.items()]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in config.target_parameters or ():
        if not any(matches(name, [pattern]) for name in names):
            found.append(
                f"relora.target_parameters: {pattern!r} matches no parameter; {_stacked(model)}, and what belongs to "
                "a linear is named by its module in relora.target_modules"
            )
    embeddings = [name for name, module in targets.linears.items() if isinstance(module, nn.Embedding)]
    if embeddings and config.frozen_dtype != "auto":
        found.append(
            f"relora.frozen_dtype: {config.frozen_dtype} is for linears, and {summary(embeddings)} is an embedding; "
            f"use frozen_dtype=auto, or {_leave_out(embeddings, targets)}"
        )
    if targets.parameters and config.lora_dropout:
        found.append(
            f"relora.lora_dropout: {config.lora_dropout:g} is not supported with relora.target_parameters, whose "
            "modules multiply with the sum W + s·B·A; use 0"
        )
    if targets.parameters and config.restart_init == "gradient":
        found.append(
            "relora.restart_init: gradient is not supported with relora.target_parameters, whose modules multiply with "
            f"the sum W + s·B·A; use restart_init={'random' if config.trains == 'B' else 'kaiming'}"
        )
    return found


def _stacked(model: nn.Module) -> str:
    """Return the names of the parameters that hold a matrix for each of several experts."""
    names = [name for name, parameter in model.named_parameters() if len(full_shape(parameter)) == 3]
    if not names:
        return "the model has no parameter of three dimensions, as fused experts are"
    return f"the model's fused experts are {', '.join(sorted({'.'.join(name.split('.')[-2:]) for name in names}))}"


def _shared_problems(model: nn.Module, targets: Targets) -> list[str]:
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    shared = [name for name, weight in targets.weights.items() if uses[id(weight)] > 1]
    if not shared:
        return []
    return [
        f"relora.target_modules: the weight of {summary(shared)} is shared with another module and cannot "
        f"be updated for one of them; leave it out, for instance with {_leave_out(shared, targets)}"
    ]


def _leave_out(names: list[str], targets: Targets) -> str:
    """Return the option that leaves targets out."""
    if all(name in targets.parameters for name in names):
        return "fewer names in relora.target_parameters"
    return f"relora.exclude_modules=[{', '.join(_last_names(names))}]"


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


def _rank_problems(targets: Targets, config: ReLoRAConfig) -> list[str]:
    """Return one message for the targets of each kind whose smaller side is below the rank."""
    small: dict[str, list[str]] = {}
    shapes = {name: full_shape(weight)[-2:] for name, weight in targets.weights.items()}
    for name, shape in shapes.items():
        if config.r > min(shape):
            small.setdefault(generic(name), []).append(name)
    return [
        f"relora.r: {config.r} exceeds the smaller side of {summary(names)} ({'x'.join(map(str, shapes[names[0]]))}); "
        f"use r <= {min(shapes[names[0]])}, or leave it out with {_leave_out(names, targets)}"
        for names in small.values()
    ]


def warnings(model: nn.Module, config: ReLoRAConfig) -> list[str]:
    """Return what wrapping a plain model with a config that has no problems leaves out or does not do."""
    targets, found = find_targets(model, config), []
    if config.target_modules in (ALL_LINEAR, ALL_MATRICES):
        found += [
            f"relora.target_modules: {text}. It is left out; {remedy} says so"
            for text, remedy in _unfit_texts(targets.unfit)
        ]
    if config.exclude_modules and not targets.excluded:
        found.append(
            f"relora.exclude_modules: {config.exclude_modules} has no effect: relora.target_modules names none of them"
        )
    found += _product_warnings(config, targets)
    return found + _trainable_warnings(model, config, targets) + _frozen_warning(model, config, targets)


def _product_warnings(config: ReLoRAConfig, targets: Targets) -> list[str]:
    """Return a message where no layer multiplies as `product` asks for."""
    if config.product == "folded" and config.lora_dropout:
        return [
            f"relora.product: folded has no effect with relora.lora_dropout {config.lora_dropout:g}, which acts on the "
            "input of A alone"
        ]
    if config.product != "auto" and not targets.linears:
        return [
            f"relora.product: {config.product} has no effect: it is for linears, and relora.target_parameters are "
            "always summed with their updates"
        ]
    return []


def _trainable_warnings(model: nn.Module, config: ReLoRAConfig, targets: Targets) -> list[str]:
    """Return a message for each name of `trainable_modules` that names targets only, which do not train whole."""
    found, places, frozen = [], list(named_places(model)), _parameters_of(targets)
    how = "owners train all of it" if config.trains == "none" else "all of it gets low-rank updates on frozen weights"
    for pattern in as_list(config.trainable_modules):
        named = [module for names, module in places if matches(names, [pattern])]
        parameters = {id(parameter) for module in named for parameter in module.parameters()}
        if pattern in DEFAULT_TRAINABLE_MODULES or not parameters or not parameters <= frozen:
            continue
        inside = {id(part) for module in named for part in module.modules()}
        names = [name for name, linear in targets.linears.items() if id(linear) in inside]
        remedy = _leave_out(names, targets) if names else "fewer names in relora.target_parameters"
        found.append(
            f"relora.trainable_modules: {pattern!r} has no effect: {how}; to train it with the optimizer, "
            f"leave it out with {remedy}"
        )
    return found


def _parameters_of(targets: Targets) -> set[int]:
    """Return the ids of the targets' weights and biases."""
    biases = {id(linear._parameters.get("bias")) for linear in targets.linears.values()}
    return {id(weight) for weight in targets.weights.values()} | biases


def left_frozen(model: nn.Module, config: ReLoRAConfig) -> list[str]:
    """Return the names of the parameters of a plain model that are no targets and do not train whole either."""
    return list(_left_frozen(model, config, find_targets(model, config))[0])


def _left_frozen(model: nn.Module, config: ReLoRAConfig, targets: Targets) -> tuple[dict[str, int], int]:
    """Return `({name: size}, size of everything)`."""
    trains = _parameters_of(targets) | trained_whole(model, config)
    frozen: dict[int, str] = {}
    sizes: dict[int, int] = {}
    for names, module in named_places(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            sizes[id(parameter)] = full_shape(parameter).numel()
            if id(parameter) not in trains:
                frozen.setdefault(id(parameter), f"{names[0]}.{leaf}".removeprefix("."))
    return {name: sizes[key] for key, name in frozen.items()}, sum(sizes.values())


def _frozen_warning(model: nn.Module, config: ReLoRAConfig, targets: Targets) -> list[str]:
    """Return a message on the parameters that have no low-rank update and do not train either."""
    frozen, everything = _left_frozen(model, config, targets)
    if not frozen:
        return []
    share = 100 * sum(frozen.values()) / everything
    return [
        f"{share:.3g} % of the parameters are frozen for good, because neither relora.target_modules, "
        "relora.target_parameters (for fused experts) nor relora.trainable_modules names them: "
        f"{summary(list(frozen))}"
    ]

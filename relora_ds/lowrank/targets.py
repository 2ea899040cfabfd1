"""Choose the linears and parameters that get a low-rank update.

A linear is an `nn.Linear` or transformers' Conv1D (GPT-2's), which keeps its weight as `[in, out]`. A target must be a
plain linear map that is called (`lowrank.peculiarities`); `methods.proof` runs a small copy of the model as well. A
parameter is what a module's own code multiplies with, such as the experts of a mixture.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.owned_layer import OwnedLayer
from relora_ds.lowrank.peculiarities import is_linear, peculiarity, read_directly

ALL_LINEAR = "all-linear"
ALL_MATRICES = "all-matrices"  # the head and the input embedding too: weights that owners update
DEFAULT_TRAINABLE_MODULES = ("embeddings", "head", "norms")


@dataclass(frozen=True)
class Targets:
    """The linears and parameters of a model and what becomes of them.

    Attributes:
        linears: the targets by their first name, in the model's order.
        parameters: those of `target_parameters`, likewise.
        unfit: `{name: reason}` of linears that `target_modules` asks for and that cannot be wrapped.
        unfit_parameters: the same of parameters, each reason with its remedy.
        excluded: names of linears that only `exclude_modules` keeps from being targets.
    """

    linears: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, "ParameterPlace"] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    unfit_parameters: dict[str, str] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights of all targets, by the targets' names."""
        return {
            **{name: linear.get_parameter("weight") for name, linear in self.linears.items()},
            **{name: place.parameter for name, place in self.parameters.items()},
        }


@dataclass(frozen=True)
class ParameterPlace:
    """A parameter `leaf` of `module`."""

    module: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.leaf)

    @property
    def transposed(self) -> bool:
        """Whether it is `[..., in, out]`; the modules of transformers' experts say so (PEFT asks the same)."""
        return self.parameter.ndim == 3 and bool(getattr(self.module, "is_transposed", False))


def find_targets(model: nn.Module, config: ReLoRAConfig) -> Targets:
    """Find the linears that `target_modules` names and `exclude_modules` does not, and what `target_parameters` names.

    "all-linear" is every linear but the output head (PEFT's rule), "all-matrices" the head too, and the input
    embedding. A module with several names is one target, and is named by any of them.
    """
    found = Targets()
    directly_read = {id(part): reason for part, reason in read_directly(model)}
    for names, module in named_places(model):
        for leaf in _named_leaves(names, module, config.target_parameters):
            place = ParameterPlace(module, leaf)
            if reason := _parameter_problem(place):
                found.unfit_parameters[_joined(names[0], leaf)] = reason
            else:
                found.parameters[_joined(names[0], leaf)] = place
        if not can_be_target(module, config) or not _is_chosen(names, module, model, config):
            continue
        if matches(names, config.exclude_modules):
            found.excluded.append(names[0])
        elif reason := peculiarity(module) or directly_read.get(id(module)):
            found.unfit[names[0]] = reason
        else:
            found.linears[names[0]] = module
    return found


def can_be_target(module: nn.Module, config: ReLoRAConfig) -> bool:
    """Return whether `target_modules` may name a module: a linear, or an embedding where there are no factors."""
    return is_linear(module) or (config.trains == "none" and isinstance(module, nn.Embedding))


def _is_chosen(names: list[str], module: nn.Module, model: nn.Module, config: ReLoRAConfig) -> bool:
    if config.target_modules == ALL_LINEAR:
        return is_linear(module) and module is not output_head(model)
    if config.target_modules == ALL_MATRICES:
        return is_linear(module) or module is input_embedding(model)
    return matches(names, config.target_modules)


def target_linears(model: nn.Module, config: ReLoRAConfig) -> dict[str, nn.Module]:
    """Return the linears that get a low-rank update, by their first name."""
    return find_targets(model, config).linears


def _named_leaves(names: list[str], module: nn.Module, patterns: list[str] | None) -> list[str]:
    """Return a module's own parameters that patterns name."""
    return [leaf for leaf in module._parameters if matches([_joined(name, leaf) for name in names], patterns)]


def _joined(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


def _parameter_problem(place: ParameterPlace) -> str | None:
    """Return why a parameter cannot get a low-rank update, and what to do."""
    if is_linear(place.module):
        return f"is the {place.leaf} of a linear; name the module in relora.target_modules"
    if isinstance(place.module, nn.Embedding):
        return "is an embedding; train it whole, with relora.trainable_modules"
    parameter = place.parameter
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if len(shape) not in (2, 3):
        return (
            f"has the shape {tuple(shape)}: it is no matrix, nor one for each of several experts; leave it out of "
            "relora.target_parameters"
        )
    return None


def named_places(model: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """`(every name, module)` of a model's modules, in its order; a module used at several places comes once."""
    places: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), ([], module))[0].append(name)
    return iter(places.values())


def replace_modules(model: nn.Module, replacements: dict[str, nn.Module]) -> None:
    """Put new modules, given by the first name of the old ones, into every place of those."""
    places = {names[0]: names for names, _ in named_places(model)}
    for first, module in replacements.items():
        for name in places[first]:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output embedding, where the model says which module it is."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the input embedding, where the model says which module it is."""
    get = getattr(model, "get_input_embeddings", None)
    return get() if get is not None else None


def as_list(names: str | list[str] | None) -> list[str]:
    """Return names as a list."""
    if names is None:
        return []
    return [names] if isinstance(names, str) else list(names)


def matches(names: str | list[str], patterns: str | list[str] | None) -> bool:
    """Return True if patterns name a module, by PEFT's rule.

    Args:
        names: of the module.
        patterns: a regular expression that is to match one of the whole names; or a list, of which one entry is to be a
            whole name or the last components of one.
    """
    if isinstance(patterns, str):
        return any(re.fullmatch(patterns, name) for name in as_list(names))
    return any(name == pattern or name.endswith("." + pattern) for name in as_list(names) for pattern in patterns or ())


def generic(name: str) -> str:
    """Return a module's name without the numbers of its layers and experts: `layers.3.mlp.up` as `layers.mlp.up`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", "", name).removeprefix(".")


def summary(names: list[str]) -> str:
    """Return a text that names modules; those that differ in a number only are counted, and named once."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(generic(name), []).append(name)
    return ", ".join(first + (f" (and {len(others)} like it)" if others else "") for first, *others in groups.values())


def trained_whole(model: nn.Module, config: ReLoRAConfig) -> set[int]:
    """Return the ids of the parameters that `trainable_modules` names; a target's own weight may be among them."""
    patterns = config.trainable_modules
    patterns = list(DEFAULT_TRAINABLE_MODULES) if patterns is None else as_list(patterns)
    head, chosen = output_head(model), set()
    for names, module in named_places(model):
        if isinstance(module, OwnedLayer):
            continue
        kinds = {
            "embeddings": isinstance(module, nn.Embedding),
            "head": module is head,
            "norms": "norm" in type(module).__name__.lower(),
        }
        if matches(names, patterns) or any(kinds.get(pattern, False) for pattern in patterns):
            chosen |= {id(parameter) for parameter in module.parameters()}
    return chosen

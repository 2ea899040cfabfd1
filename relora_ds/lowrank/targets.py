"""Choose the linears that get a low-rank update.

A target must be a plain linear map that is called: the layer that takes its place knows `x Wᵀ + b` and nothing else,
and what reads `.weight` instead of calling the module would never see the update. This is decided here from the modules
and their source code alone; `methods.proof` runs a small copy of the model as well.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.linear import ReLoRALinear

ALL_LINEAR = "all-linear"
_DESCRIPTIVE = {"dtype", "device", "shape", "size", "is_meta", "ndim", "requires_grad"}
_SETUP = re.compile("init|reset_parameters")  # methods that do not run in forward


@dataclass(frozen=True)
class Targets:
    """The linears of a model and what becomes of them.

    Attributes:
        linears: the targets by their first name, in the model's order.
        unfit: `{name: reason}` of linears that `target_modules` asks for and that cannot be wrapped.
        excluded: names of linears that only `exclude_modules` keeps from being targets.
    """

    linears: dict[str, nn.Linear]
    unfit: dict[str, str]
    excluded: list[str]


def find_targets(model: nn.Module, config: ReLoRAConfig) -> Targets:
    """Find the linears that `target_modules` names and `exclude_modules` does not.

    "all-linear" is every `nn.Linear` but the output head (PEFT's rule). A module with several names is one target, and
    is named by any of them.
    """
    head, wanted, unwanted = output_head(model), as_list(config.target_modules), as_list(config.exclude_modules)
    is_all = config.target_modules == ALL_LINEAR
    read_directly = {id(part): reason for part, reason in _read_directly(model)}
    found = Targets({}, {}, [])
    for names, module in named_places(model):
        if not isinstance(module, nn.Linear) or not (module is not head if is_all else matches(names, wanted)):
            continue
        if matches(names, unwanted):
            found.excluded.append(names[0])
        elif reason := _peculiarity(module) or read_directly.get(id(module)):
            found.unfit[names[0]] = reason
        else:
            found.linears[names[0]] = module
    return found


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


def as_list(names: str | list[str] | None) -> list[str]:
    """Return names as a list."""
    if names is None:
        return []
    return [names] if isinstance(names, str) else list(names)


def matches(names: str | list[str], patterns: list[str]) -> bool:
    """Return True if a pattern is one of the whole module names, or the last components of one (PEFT's rule)."""
    return any(name == pattern or name.endswith("." + pattern) for name in as_list(names) for pattern in patterns)


def generic(name: str) -> str:
    """Return a module's name without the numbers of its layers and experts: `layers.3.mlp.up` as `layers.mlp.up`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", "", name).removeprefix(".")


def summary(names: list[str]) -> str:
    """Return a text that names modules; those that differ in a number only are counted, and named once."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(generic(name), []).append(name)
    return ", ".join(first + (f" (and {len(others)} like it)" if others else "") for first, *others in groups.values())


def _peculiarity(linear: nn.Linear) -> str | None:
    """Return why a linear's function is not `x Wᵀ + b`, or cannot be kept."""
    if nn.parameter.is_lazy(linear.weight):
        return "has no shape yet (a lazy module); run the model once first"
    if "forward" in vars(linear):
        return "has a forward function put into this one module"
    if any(
        getattr(linear, hooks)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ):
        return "has hooks, which wrapping would drop; remove them, or register them on the wrapped model"
    if set(linear._parameters) != {"weight", "bias"} or not isinstance(linear.weight, nn.Parameter):
        return "computes its weight from other tensors (weight norm, pruning or a parametrization)"
    if linear._buffers or linear._modules or (type(linear) is not nn.Linear and not _is_plain(linear)):
        return f"is a {type(linear).__name__}, which computes something else than nn.Linear"
    return None


def _is_plain(linear: nn.Linear) -> bool:
    """Return True if a subclass of nn.Linear computes what nn.Linear does, found with a small weight in its place."""
    if type(linear).forward is nn.Linear.forward:
        return True
    training, x_grads, results = linear.training, [], []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        weight, x = torch.randn(3, 5), torch.randn(2, 4, 5)
        tensors = {"weight": weight} | ({} if linear.bias is None else {"bias": torch.randn(3)})
        try:
            for mode in (None, True, False):
                point = x.clone().requires_grad_()
                linear.training = mode is True
                y = (
                    F.linear(point, **tensors)
                    if mode is None
                    else torch.func.functional_call(linear, tensors, (point,))
                )
                y.square().sum().backward()
                results.append(y.detach())
                x_grads.append(point.grad)
        except Exception:  # code that expects other shapes
            return False
        finally:
            linear.training = training
    return all(isinstance(y, Tensor) and torch.allclose(y, results[0], rtol=1e-5, atol=1e-6) for y in results) and all(
        torch.allclose(grad, x_grads[0], rtol=1e-5, atol=1e-6) for grad in x_grads
    )


def _read_directly(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The linears whose weight is read by the code of the module that holds them, and why that matters."""
    for module in model.modules():
        if isinstance(module, (ReLoRALinear, nn.TransformerEncoderLayer)):  # wrapping switches the latter's reads off
            continue
        for name, flags in _weights_read_by(type(module)):
            part = module._modules.get(name)
            if isinstance(part, nn.Linear) and not any(getattr(module, flag, None) is False for flag in flags):
                yield (
                    part,
                    (
                        f"is not always called: {type(module).__name__} reads its weight directly, where the "
                        "low-rank update would be missing"
                    ),
                )


@functools.cache
def _weights_read_by(kind: type) -> frozenset[tuple[str, tuple[str, ...]]]:
    """`(NAME, flags)` of each `self.NAME.weight` whose value a class uses; flags: see `_weights_read_in`."""
    found = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # compiled, or written at a prompt
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and not _SETUP.search(method.name):
                found |= set(_weights_read_in(method))
    return frozenset(found)


def _weights_read_in(node: ast.AST, flags: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Reads of `self.NAME.weight` below a node. flags: attributes of self that are true where the code runs.

    `training` is none of them: a model may be wrapped in evaluation mode and train later.
    """
    if isinstance(node, ast.Attribute) and node.attr in _DESCRIPTIVE:
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "hasattr"):
        return
    if (
        isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and isinstance(node.ctx, ast.Load)
        and (name := _own_attribute(node.value))
    ):
        yield name, flags
    for field, value in ast.iter_fields(node):
        inner = flags
        if isinstance(node, ast.If) and field == "body":
            tests = (
                node.test.values
                if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
                else [node.test]
            )
            inner += tuple(flag for test in tests if (flag := _own_attribute(test)) not in (None, "training"))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _weights_read_in(child, inner)


def _own_attribute(node: ast.AST) -> str | None:
    """Return NAME of the expression `self.NAME`."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own else None

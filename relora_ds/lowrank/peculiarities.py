"""What keeps a linear from being replaced by a low-rank one.

The layer that takes its place knows `x Wᵀ + b` and nothing else, and what reads `.weight` instead of calling the module
would never see the update. This is decided from the modules and their source code alone.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_ds.lowrank.base_layer import LowRankLayer

_DESCRIPTIVE = {"dtype", "device", "shape", "size", "is_meta", "ndim", "requires_grad"}
_SETUP = re.compile("init|reset_parameters")  # methods that do not run in forward


def is_linear(module: nn.Module | None) -> bool:
    """Return True for a linear map with a weight of its own: `nn.Linear`, or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module | None) -> bool:
    """Return True for transformers' Conv1D: a linear whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def peculiarity(linear: Any) -> str | None:
    """Return why a linear's function is not `x Wᵀ + b`, an embedding's no lookup, or why it cannot be kept."""
    if nn.parameter.is_lazy(linear.weight):
        return "has no shape yet (a lazy module); run the model once first"
    if "forward" in vars(linear):
        return "has a forward function put into this one module"
    if any(
        getattr(linear, hooks)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ):
        return "has hooks, which wrapping would drop; remove them, or register them on the wrapped model"
    if isinstance(linear, nn.Embedding):
        return _of_embedding(linear)
    if set(linear._parameters) != {"weight", "bias"} or not isinstance(linear.weight, nn.Parameter):
        return "computes its weight from other tensors (weight norm, pruning or a parametrization)"
    if linear._buffers or linear._modules or not (is_conv1d(linear) or _is_plain(linear)):
        return f"is a {type(linear).__name__}, which computes something else than nn.Linear"
    return None


def _of_embedding(embedding: nn.Embedding) -> str | None:
    if type(embedding).forward is not nn.Embedding.forward or set(embedding._parameters) != {"weight"}:
        return f"is a {type(embedding).__name__}, which computes something else than nn.Embedding"
    if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
        return "has max_norm, sparse or scale_grad_by_freq set"
    return None


def _is_plain(linear: nn.Module) -> bool:
    """Return True if a subclass of nn.Linear computes what nn.Linear does, found with a small weight in its place."""
    if type(linear).forward is nn.Linear.forward:
        return True
    training, results = linear.training, []
    x_grads: list[Any] = []
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


def read_directly(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the linears whose weight is read by the code of the module that holds them, and why that matters."""
    for module in model.modules():
        if isinstance(module, (LowRankLayer, nn.TransformerEncoderLayer)):  # wrapping switches the latter's reads off
            continue
        for name, flags in _weights_read_by(type(module)):  # type: ignore[arg-type]  # classes are hashable
            part = module._modules.get(name)
            is_target = is_linear(part) or isinstance(part, nn.Embedding)
            if part is not None and is_target and not any(getattr(module, flag, None) is False for flag in flags):
                yield part, f"is not always called: {type(module).__name__} reads its weight past the layer"


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
    """Yield the reads of `self.NAME.weight` below a node. flags: attributes of self that are true where the code runs.

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
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None

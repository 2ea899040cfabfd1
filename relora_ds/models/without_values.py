"""Models whose parameters have shapes and no values: they cost no memory, whatever their size."""

import logging
from collections.abc import Container, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.models.loading import from_config

logger = logging.getLogger(__name__)


@contextmanager
def parameters_on_meta(keep: Container[int] = ()) -> Iterator[list[nn.Parameter]]:
    """Move every parameter to the meta device as soon as a module has it. Buffers are computed as ever.

    Parameters keep their identity, so that those which a constructor ties stay tied.

    Args:
        keep: those that keep their values, by their number in the order of registration.

    Yields:
        The parameters in this order; the list fills while modules are built.
    """
    registered: list[nn.Parameter] = []
    seen: set[int] = set()
    register_as_before = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register_as_before(module, name, parameter)
        if parameter is None or parameter.is_meta or id(parameter) in seen:
            return
        if len(registered) not in keep:
            set_value(parameter, parameter.detach().to("meta"))
        seen.add(id(parameter))
        registered.append(parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]  # put back below
    try:
        yield registered
    finally:
        nn.Module.register_parameter = register_as_before  # type: ignore[method-assign]


def set_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter another tensor, on whatever device; it stays the same object for all that refer to it."""
    other = nn.Parameter(value, parameter.requires_grad)
    vars(other).update(vars(parameter))  # the marks that some families set on their parameters
    torch.utils.swap_tensors(parameter, other)


def build_without_values(config: PretrainedConfig, **options) -> PreTrainedModel:
    """`from_config` with every parameter on the meta device and every buffer as it would be.

    Code of a family that computes with its parameters while it builds them cannot do without: such a model is built
    whole first.
    """
    try:
        with parameters_on_meta():
            return from_config(config, **options)
    except Exception as error:  # whatever an operation on the meta device raises in the code of a family
        model = from_config(config, **options)  # a configuration of which no model can be made fails here, too
        logger.warning(
            "%s computes with its parameters while it is built (%s), so every rank builds it whole for a moment",
            type(model).__name__,
            str(error).split("\n")[0],
        )
    for parameter in model.parameters():
        set_value(parameter, parameter.detach().to("meta"))
    return model


@torch.no_grad()
def fill(model: PreTrainedModel, weights) -> PreTrainedModel:
    """Give a model without values those of a source of weights (see `zero.weights`), one tensor at a time.

    Raises:
        ValueError: two that differ are tied in the model.
    """
    for names, tensor in tensor_names(model):
        first, *others = [name for name in names if name in weights.shapes]
        value = weights.read(first)
        if differ := [name for name in others if not torch.equal(weights.read(name), value)]:
            raise ValueError(
                f"weights: {first} and {differ[0]} differ, but share one tensor in this model; set "
                "tie_word_embeddings to false in its configuration"
            )
        if isinstance(tensor, nn.Parameter):
            set_value(tensor, value.to(tensor.dtype))
        else:
            tensor.copy_(value)
    return model


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are saved with a model, by name."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved}


def tensor_names(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """`(names, tensor)` of every parameter and persistent buffer; a tied parameter has several names."""
    names: dict[int, list[str]] = {}
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    return [(names[key], tensors[key]) for key in names] + [([n], b) for n, b in persistent_buffers(model).items()]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model's weights consist of: its parameters, tied ones once, and persistent buffers."""
    return {**dict(model.named_parameters()), **persistent_buffers(model)}

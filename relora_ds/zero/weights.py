"""Where an engine's weights come from: fp32 tensors of the plain model, read one at a time.

An engine is built on a model without values and then filled (`zero.fill`), so that no process holds a model twice, and
at ZeRO-3 none holds it whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.inventory import full_shape, is_lora_parameter, lowrank_layers, owned_layers, plain_parameters
from relora_ds.zero.frozen_master import assign_owners, frozen_owners
from relora_ds.zero.partitions import copy_common, partition_range
from relora_ds.zero.plain_model import persistent_buffers


class WeightSource(Protocol):
    """The weights of a plain model, under the names of an unwrapped one.

    Attributes:
        shapes: of every parameter (of tied ones, one name is enough) and every persistent buffer.
        owners: the one rank that can read a tensor, by name; every rank can read those that are not in it. None: all.
    """

    @property
    def shapes(self) -> Mapping[str, torch.Size]: ...

    @property
    def owners(self) -> Mapping[str, int] | None: ...

    def read(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU, fp32 where it is floating point. Called on one rank, once for each name.

        It may fail with any exception; all ranks then end with a ValueError that names the tensor and the reason.
        """


class OwnedWeights:
    """Tensors that are spread over the ranks; each is given away when it is read.

    Args:
        shapes, owners: of all tensors, the same on every rank.
        tensors: those that this rank owns.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], owners: Mapping[str, int], tensors: dict[str, Tensor]):
        self.shapes, self._tensors = shapes, tensors
        self.owners = owners

    def read(self, name: str) -> Tensor:
        return self._tensors.pop(name)


class PartitionedWeights:
    """What ZeRO-3 has partitioned in a model already, read in pieces by all ranks together.

    Args:
        parameters: they may be given other storage; it is their partitions that are kept here, until they are read.
    """

    def __init__(self, parameters: Mapping[str, Any]):
        self.shapes = {name: parameter.ds_shape for name, parameter in parameters.items()}
        self._partitions = {name: (partition_range(p), p.ds_tensor) for name, p in parameters.items()}

    def piece(self, name: str, start: int, stop: int, device: torch.device) -> Tensor:
        """Elements of a flattened tensor on every rank, fp32. Collective."""
        (first, last), partition = self._partitions[name]
        value = torch.zeros(stop - start, device=device)
        copy_common(value, start, partition[: last - first], first)
        dist.all_reduce(value)  # an element is non-zero on one rank at most: the sum is exact
        return value

    def forget(self, name: str) -> None:
        """Free a partition."""
        del self._partitions[name]


class Nothing:
    """In place of a source: the engine begins with meaningless values, because a checkpoint is loaded into it next."""


NOTHING = Nothing()


def readers_of(model: nn.Module) -> dict[str, int]:
    """Return the rank that reads each tensor where every rank can: a frozen weight's owner, others in equal parts."""
    layers = owned_layers(model)
    owners = {layers[name].plain_name(name): owner for name, owner in frozen_owners(layers).items()}
    others = {tensor.name: tensor.shape.numel() for tensor in plain_tensors(model) if tensor.name not in owners}
    return owners | assign_owners(others, dist.get_world_size())


@dataclass(frozen=True)
class PlainTensor:
    """A parameter or a persistent buffer of a plain model; a tied parameter has several names."""

    names: list[str]
    shape: torch.Size

    @property
    def name(self) -> str:
        """The first of the names, by which the model's parameters are listed."""
        return self.names[0]


def plain_tensors(model: nn.Module) -> list[PlainTensor]:
    """Return what a model consists of, wrapped or not, with or without values, and however its weights are stored."""
    found = plain_parameters(model)
    names = {id(parameter): names for names, parameter in found}
    shapes = {id(parameter): full_shape(parameter) for _, parameter in found}
    for name, layer in owned_layers(model).items():
        if layer.weight is not None:  # it may be packed, or a buffer
            names.setdefault(id(layer.weight), [layer.plain_name(name)])
            shapes[id(layer.weight)] = layer.weight_shape
        if isinstance(layer, LowRankLayer) and layer.one_sided:  # a buffer at times
            names.setdefault(id(layer.lora_A), [f"{name}.lora_A"])
            shapes[id(layer.lora_A)] = layer.shape_of_A
    buffers = [PlainTensor([name], buffer.shape) for name, buffer in persistent_buffers(model).items()]
    return [PlainTensor(names[key], shapes[key]) for key in names] + buffers


def problems(source: WeightSource, model: nn.Module) -> list[str]:
    """Return why `source` does not have what `model` consists of.

    The factors of low-rank layers need not be in it: they begin as they do after wrapping. Of a low-rank layer without
    a base, it may have the weight that the layer replaced.
    """
    wanted = plain_tensors(model)
    replaced = [
        PlainTensor([layer.plain_name(name)], layer.weight_shape)
        for name, layer in lowrank_layers(model).items()
        if layer.weight is None
    ]
    known = {name: tensor.shape for tensor in (*wanted, *replaced) for name in tensor.names}
    missing = [
        tensor.name
        for tensor in wanted
        if not (source.shapes.keys() & set(tensor.names) or is_lora_parameter(tensor.name))
    ]
    unexpected = [name for name in source.shapes if name not in known]
    reshaped = [
        f"{name} {tuple(shape)} instead of {tuple(known[name])}"
        for name, shape in source.shapes.items()
        if name in known and torch.Size(shape) != known[name]
    ]
    if not (missing or unexpected or reshaped):
        return []
    return [
        f"weights: {_list('missing', missing)}, {_list('unexpected', unexpected)}, "
        f"{_list('of another shape', reshaped)}; they are of another model"
    ]


def _unreadable(source: WeightSource) -> list[str]:
    """Return why no rank could read a tensor of a source."""
    ranks = dist.get_world_size()
    absent = [name for name, owner in (source.owners or {}).items() if owner not in range(ranks)]
    return (
        [f"weights: {_list('of ranks that do not exist', absent)}; spread them over {ranks} rank(s)"] if absent else []
    )


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3]) or 'none'}{more}"


def sources_of(model: nn.Module, weights: WeightSource | Nothing | None) -> list[WeightSource | PartitionedWeights]:
    """Everything that the values of an engine's parameters are read from: `weights`, or what `model` holds already.

    The low-rank factors that have values keep them. Rank 0's values count. Tensors are taken over, not copied.

    Raises:
        ValueError: there are no values, or `weights` are of another model.
    """
    _require_values(
        dict(model.named_buffers()),
        "buffers",
        ", which no source of weights has; leave only "
        "parameters there, as accelerate.init_empty_weights(include_buffers=False) does",
    )
    if isinstance(weights, Nothing):
        return []
    unset = {
        f"{name}.{factor}"
        for name, layer in lowrank_layers(model).items()
        if layer.initial_seed is not None
        for factor in ("lora_A", "lora_B")
    }
    own = {
        name: p
        for (name, *_), p in plain_parameters(model)
        if name not in unset and (weights is None or is_lora_parameter(name))
    }
    if weights is None:
        _require_values(own, "parameters", "; pass weights=, a source of them (relora_ds.zero.weights)")
    elif found := problems(weights, model) or _unreadable(weights):
        raise ValueError("\n".join(found))
    partitioned = {name: p for name, p in own.items() if hasattr(p, "ds_tensor")}
    whole = {name: p.detach() for name, p in own.items() if name not in partitioned}
    values = OwnedWeights(
        {name: value.shape for name, value in whole.items()},
        dict.fromkeys(whole, 0),
        whole if dist.get_rank() == 0 else {},
    )
    return [*([] if weights is None else [weights]), PartitionedWeights(partitioned), values]


def _require_values(tensors: Mapping[str, Tensor], what: str, more: str) -> None:
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(
            f"model: {len(empty)} of its {what} are on the meta device (the first: {empty[0]}) and have no values{more}"
        )

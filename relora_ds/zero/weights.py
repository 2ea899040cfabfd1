"""Where an engine's weights come from: fp32 tensors of the plain model, read one at a time.

An engine is built on a model without values and filled from a source (`zero.fill`), so that no process holds a model
twice, and at ZeRO-3 none holds it whole.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from relora_ds.lowrank.wrap import full_shape, is_lora_parameter, lowrank_layers
from relora_ds.zero.plain_model import persistent_buffers


class WeightSource(Protocol):
    """The weights of a plain model, under the names of an unwrapped one.

    Attributes:
        shapes: of every parameter (of tied ones, one name is enough) and every persistent buffer.
        owners: the one rank that can read a tensor, by name; None where every rank can read all.
    """

    shapes: Mapping[str, torch.Size]
    owners: Mapping[str, int] | None

    def read(self, name: str) -> Tensor:
        """A whole tensor on the CPU, fp32 where it is floating point. Called on one rank, once for each name.

        It may fail with any exception; all ranks then end with a ValueError that names the tensor and the reason.
        """


class OwnedWeights:
    """Tensors that are spread over the ranks; each is given away when it is read.

    Args:
        shapes, owners: of all tensors, the same on every rank.
        tensors: those that this rank owns.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], owners: Mapping[str, int], tensors: dict[str, Tensor]):
        self.shapes, self.owners, self._tensors = shapes, owners, tensors

    def read(self, name: str) -> Tensor:
        return self._tensors.pop(name)


def problems(source: WeightSource, model: nn.Module) -> list[str]:
    """Why `source` does not have what `model` (wrapped or not, with or without values) consists of.

    The factors of low-rank layers need not be in it: they begin as they do after wrapping. A low-rank layer without a
    base weight does not need the weight that it replaced.
    """
    wanted, optional = plain_shapes(model), _replaced_shapes(model)
    known = {name: shape for names, shape in (*wanted, *optional) for name in names}
    missing = [names[0] for names, _ in wanted
               if not any(name in source.shapes for name in names) and not is_lora_parameter(names[0])]
    unexpected = [name for name in source.shapes if name not in known]
    reshaped = [f"{name} {tuple(shape)} instead of {tuple(known[name])}" for name, shape in source.shapes.items()
                if name in known and shape != known[name]]
    if not (missing or unexpected or reshaped):
        return []
    return [f"weights: {_list('missing', missing)}, {_list('unexpected', unexpected)}, "
            f"{_list('of another shape', reshaped)}; they are of another model"]


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3]) or 'none'}{more}"


def plain_shapes(model: nn.Module) -> list[tuple[list[str], torch.Size]]:
    """`(names, shape)` of every parameter and persistent buffer; a tied parameter has several names."""
    bases = {id(layer.weight): layer.weight_shape for layer in lowrank_layers(model).values()
             if layer.weight is not None}
    names: dict[int, list[str]] = {}
    shapes: dict[int, torch.Size] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        shapes[id(parameter)] = bases.get(id(parameter), full_shape(parameter))
    buffers = [([name], buffer.shape) for name, buffer in persistent_buffers(model).items()]
    return [(names[key], shapes[key]) for key in names] + buffers


def _replaced_shapes(model: nn.Module) -> list[tuple[list[str], torch.Size]]:
    """Those of weights that low-rank layers without a base replaced."""
    return [([f"{name}.weight"], layer.weight_shape) for name, layer in lowrank_layers(model).items()
            if layer.weight is None]

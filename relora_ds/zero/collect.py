"""The plain model inside an engine: every weight in fp32, updates merged, under the names of an unwrapped model.

The phase transition, the export and `save_merged` all start from here.
"""

from collections.abc import Callable, Container, Iterator, Mapping

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.owned_layer import OwnedLayer
from relora_ds.lowrank.wrap import is_lora_parameter, owned_layers
from relora_ds.zero.frozen_master import FrozenWeights, is_partitioned
from relora_ds.zero.plain_model import persistent_buffers
from relora_ds.zero.shards import ShardView
from relora_ds.zero.weights import OwnedWeights, plain_tensors


@torch.no_grad()
def collect_merged(
    module: nn.Module, shards: ShardView, frozen: FrozenWeights, *, device: torch.device, dst: int | None = None
) -> dict[str, Tensor]:
    """`{parameter name: fp32 CPU tensor}` of the merged model, from the masters. Collective; nothing is changed.

    Persistent buffers are in it too.

    Args:
        dst: the one rank that gets it (the others get {}), or None for every rank.
    """
    return {
        name: value
        for name, value in _merged_tensors(module, shards, frozen, device, lambda name: dst)
        if value is not None
    }


@torch.no_grad()
def collect_owned(
    module: nn.Module, shards: ShardView, frozen: FrozenWeights, *, device: torch.device, owners: Mapping[str, int]
) -> OwnedWeights:
    """Return the same spread over the ranks, each tensor on its owner alone; those without an owner are left out."""
    shapes = {
        tensor.name: tensor.shape
        for tensor in plain_tensors(module)
        if tensor.name in owners and not is_lora_parameter(tensor.name)
    }
    shapes |= {
        key: layer.weight_shape
        for name, layer in owned_layers(module).items()
        if (key := layer.plain_name(name)) in owners
    }
    found = {
        name: value
        for name, value in _merged_tensors(module, shards, frozen, device, owners.get, shapes)
        if value is not None
    }
    return OwnedWeights(shapes, owners, found)


def collect_moments(shards: ShardView, what: str, owners: Mapping[str, int]) -> OwnedWeights:
    """Return the Adam moments `what` of the parameters in `owners`, each on its owner alone. Collective."""
    values = {name: shards.collect(name, what, owner) for name, owner in owners.items()}
    return OwnedWeights(
        {name: shards[name].shape for name in owners},
        owners,
        {name: value for name, value in values.items() if value is not None},
    )


def gather_factors(
    shards: ShardView, frozen: FrozenWeights, name: str, dst: int | None
) -> tuple[Tensor, Tensor] | None:
    """Return a layer's `(A, B)` in fp32 on rank `dst` (None: on every rank), None elsewhere. Collective.

    Masters where they train; a frozen A as forward reads it.
    """
    one_sided = name in frozen.one_sided
    lora_A = frozen.read_A(name) if one_sided else None
    factors = ("lora_B",) if one_sided else ("lora_A", "lora_B")
    found = shards.gather([f"{name}.{factor}" for factor in factors], dst=dst)
    if not found:
        return None
    return found[f"{name}.lora_A"] if lora_A is None else lora_A, found[f"{name}.lora_B"]


def _merged_tensors(
    module: nn.Module,
    shards: ShardView,
    frozen: FrozenWeights,
    device: torch.device,
    dst_of: Callable[[str], int | None],
    wanted: Container[str] | None = None,
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield every tensor of the merged model (of `wanted`) by name, on the CPU; None on ranks that do not get it."""
    layers = owned_layers(module)
    for name, parameter in module.named_parameters():
        if not is_lora_parameter(name) and name.removesuffix(".weight") not in layers and _is_in(name, wanted):
            yield name, _parameter(name, parameter, shards, dst_of(name))
    for name, buffer in persistent_buffers(module).items():
        if _is_in(name, wanted):
            dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
            yield name, buffer.to("cpu", dtype, copy=True) if _gets(dst_of(name)) else None
    for name, layer in layers.items():
        if _is_in(key := layer.plain_name(name), wanted):
            merged = _merged(name, layer, shards, frozen, device, dst_of(key))
            yield key, merged.cpu() if merged is not None and _gets(dst_of(key)) else None


def _is_in(name: str, wanted: Container[str] | None) -> bool:
    return wanted is None or name in wanted


def _gets(dst: int | None) -> bool:
    return dst is None or dst == dist.get_rank()


def _parameter(name: str, parameter: nn.Parameter, shards: ShardView, dst: int | None) -> Tensor | None:
    """One that is no low-rank layer's weight, fp32 on the CPU."""
    if parameter.requires_grad:
        return shards.gather([name])[name].cpu() if dst is None else shards.collect(name, "master", dst)
    with GatheredParameters([parameter], enabled=is_partitioned(parameter)):
        return parameter.detach().to("cpu", torch.float32, copy=True) if _gets(dst) else None


def _merged(
    name: str, layer: OwnedLayer, shards: ShardView, frozen: FrozenWeights, device: torch.device, dst: int | None
) -> Tensor | None:
    """Return the merged weight of one layer, fp32 on `device`; None on ranks that are not asked for it."""
    owner = frozen.owners.get(name, dst)
    factors = gather_factors(shards, frozen, name, owner) if isinstance(layer, LowRankLayer) else None
    if name in frozen.layers:
        base = frozen.read(name, device)
    else:  # no base: y = s·B·A·x
        base = torch.zeros(layer.weight_shape, device=device) if factors else None
    if base is not None and isinstance(layer, LowRankLayer):
        assert factors is not None
        layer.merge_(base, *factors)
    if name not in frozen.layers:
        return base
    if dst is None or owner != dst:
        # dst=None: everybody needs it. Otherwise one rank does, and a broadcast is still the one way that
        # every backend knows; this runs at the end of a run, not in the loop.
        if base is None:
            base = torch.empty(layer.weight_shape, device=device)
        dist.broadcast(base, owner)
    return base

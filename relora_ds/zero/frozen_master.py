"""The fp32 masters of the frozen weights, each held by one rank, on CPU, touched only at a restart.

What trains has fp32 masters in ZeRO's optimizer. The frozen weights need them as much: a merge into a
bf16 weight in place loses most of a small update (see `lowrank.frozen`). Each frozen weight has one owner
rank. It holds the master, merges into it, rounds the whole tensor once and broadcasts the stored copy, so
that all ranks hold the same bytes by construction.
"""

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.zero.shards import write_partition


def assign_owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """`{name: rank}` such that the ranks' total sizes are balanced: largest first, to the least loaded rank."""
    load = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return {name: owners[name] for name in sizes}


class FrozenWeights:
    """The frozen weights of a model's ReLoRA layers: owners, masters, and the copies that forward reads.

    Build it from the fp32 module before DeepSpeed casts it, with the same values on every rank.

    Args:
        layers: the wrapped layers with a base weight, by name.
        with_masters: keep fp32 masters. Without them the stored copy is all there is: exact where it is
            fp32, rounded stochastically at a merge where it is bf16.
    """

    def __init__(self, layers: dict[str, ReLoRALinear], *, with_masters: bool):
        self.layers = {name: layer for name, layer in layers.items() if layer.weight is not None}
        self.owners = assign_owners({name: layer.weight.numel() for name, layer in self.layers.items()},
                                    dist.get_world_size())
        self.with_masters = with_masters
        self.masters: dict[str, Tensor] = {}
        if with_masters:
            for name in self.owned():
                self.masters[name] = _on_host(self.layers[name].weight)

    def owned(self) -> list[str]:
        """The layers whose weights this rank owns, in model order."""
        return [name for name, owner in self.owners.items() if owner == dist.get_rank()]

    def read(self, name: str, device: torch.device) -> Tensor | None:
        """The fp32 value to merge into: a new tensor on the owner, None elsewhere. Collective."""
        mine = self.owners[name] == dist.get_rank()
        if self.with_masters:
            return self.masters[name].to(device, copy=True) if mine else None
        weight = self.layers[name].weight
        with GatheredParameters([weight], enabled=is_partitioned(weight)):
            return weight.detach().to(device, torch.float32, copy=True) if mine else None

    def keep(self, name: str, value: Tensor) -> None:
        """On the owner: make `value`, fp32, the new master."""
        if self.with_masters:
            self.masters[name].copy_(value)

    def publish(self, name: str, stored: Tensor | None, device: torch.device) -> None:
        """Broadcast the owner's stored copy and put it (at ZeRO-3: this rank's piece of it) where forward reads it."""
        weight = self.layers[name].weight
        if stored is None:
            stored = torch.empty(frozen_shape(weight), dtype=weight.dtype, device=device)
        dist.broadcast(stored, self.owners[name])
        if is_partitioned(weight):
            write_partition(weight, stored)
        else:
            weight.data.copy_(stored)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 shards the parameter."""
    return hasattr(parameter, "ds_tensor")


def frozen_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's full shape, also while ZeRO-3 has it partitioned."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def _on_host(weight: Tensor) -> Tensor:
    master = weight.detach().to("cpu", torch.float32, copy=True)
    return master.pin_memory() if torch.cuda.is_available() else master

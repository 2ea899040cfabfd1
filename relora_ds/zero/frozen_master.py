"""The frozen weights of an engine: how they are stored, who owns them, and their fp32 masters.

What trains has fp32 masters in ZeRO's optimizer. The frozen weights need them as much: a merge into a
bf16 or quantized weight in place loses most of a small update (see `lowrank.frozen`). Each frozen weight has one owner
rank. It holds the master, merges into it, quantizes the whole tensor once and broadcasts the stored copy, so
that all ranks hold the same bytes by construction.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.formats import DTYPES
from relora_ds.lowrank.fp8 import multiplies_fp8
from relora_ds.lowrank.frozen import MergeLedger, round_unbiased
from relora_ds.lowrank.owned_layer import OwnedLayer
from relora_ds.lowrank.seeding import keyed_generator
from relora_ds.lowrank.storage import Storage, format_at, has_masters, is_sharded, shape_problems
from relora_ds.zero.partitions import partition_range, write_partition
from relora_ds.zero.pinned import MasterStore


def assign_owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """`{name: rank}` such that the ranks' total sizes are balanced: largest first, to the least loaded rank."""
    load = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return {name: owners[name] for name in sizes}


def frozen_owners(layers: Mapping[str, OwnedLayer]) -> dict[str, int]:
    """Return the rank that owns the weight of each layer, by name; layers without a base weight are left out."""
    sizes = {name: layer.weight_shape.numel() for name, layer in layers.items() if layer.weight is not None}
    return assign_owners(sizes, dist.get_world_size())


class FrozenWeights:
    """The frozen weights of a model's ReLoRA layers: owners, masters, and the copies that forward reads.

    Build it before DeepSpeed sees the module. It replaces the layers' weights by stored ones without values: parameters
    on the meta device, which get storage with all others, or buffers. `take` brings the values.

    Args:
        layers: the wrapped layers, by name; those without a base weight are left out.
        relora: says how weights are stored and where masters live; None for a model without layers.
        precision: of the run.
        stage: ZeRO stage, 0 to 3.
        device: that this rank computes on.

    Attributes:
        storage: how they are kept.
        format: of the stored copies.
        dtype: that computes.
        with_masters: there are fp32 masters. Without them the stored copy is all there is: exact where it is
            fp32; at a merge rounded stochastically where it is bf16, and quantized to nearest otherwise.
        decay: ρ, one for all layers, which compute with `ρ·W`; None: nothing decays. It changes at every step, and W at
            merges only.
        lowrank: those of the layers that have factors: all of them, or none.
        one_sided: names of those whose A is frozen.
        masters: of the weights that this rank owns, fp32.
        ledgers: of the weights that this rank owns.

    Raises:
        ValueError: a weight has a shape that the format cannot store; names it.
    """

    def __init__(
        self,
        layers: Mapping[str, OwnedLayer],
        relora: ReLoRAConfig | None,
        *,
        precision: str,
        stage: int,
        device: torch.device,
    ):
        relora = relora or ReLoRAConfig()
        self.layers = {name: layer for name, layer in layers.items() if layer.weight is not None}
        self.owners = frozen_owners(self.layers)
        self.dtype, self.device = DTYPES[precision], device
        self.decay: Tensor | None = None
        replicated = stage == 3 and not is_sharded(relora, stage)
        self.format = format_at(relora, precision, stage, in_fp8=_all_ranks_multiply_fp8(device))
        if found := shape_problems({name: layer.weight_shape for name, layer in self.layers.items()}, self.format):
            raise ValueError("\n".join(found))
        stored_dtype = self.format.floating_dtype(self.dtype)
        self.with_masters = has_masters(relora, precision)
        self.storage = Storage(
            self.format.name,
            next((n for n, dtype in DTYPES.items() if dtype == stored_dtype), ""),
            replicated,
            self.with_masters,
        )
        self.ledgers = {name: MergeLedger(self.layers[name].weight_shape.numel()) for name in self.owned()}
        on_host = relora.frozen_master == "cpu"
        self.masters = MasterStore(
            {name: self.layers[name].weight_shape for name in self.owned() if self.with_masters},
            torch.device("cpu") if on_host else device,
            pinned=on_host and device.type == "cuda",
        )
        self.lowrank = {name: layer for name, layer in self.layers.items() if isinstance(layer, LowRankLayer)}
        self.one_sided = [name for name, layer in self.lowrank.items() if layer.one_sided]
        for layer in self.layers.values():
            empty = self.format.stored_like(layer.weight_shape, self.dtype, device if replicated else "meta")
            layer.store_weight(empty, self.format, as_buffer=replicated)
            if replicated and isinstance(layer, LowRankLayer) and layer.one_sided:
                layer.freeze_A_in_buffer(torch.empty(layer.shape_of_A, dtype=self.dtype, device=device))

    def set_decay(self, value: float) -> None:
        """Have all layers compute with `value·W`. In fp64 on the CPU: in bf16, 0.998 would be 1."""
        if self.decay is None:
            self.decay = torch.ones((), dtype=torch.float64)
            for layer in self.layers.values():
                layer.decay = self.decay
        self.decay.fill_(value)

    def owned(self) -> list[str]:
        """Return the layers whose weights this rank owns, in model order."""
        return [name for name, owner in self.owners.items() if owner == dist.get_rank()]

    def rounds(self) -> list[list[str]]:
        """Return the layers in turns, at most one of each owner, largest first: those of a round take equally long."""
        by_owner: dict[int, list[str]] = {}
        for name in sorted(self.layers, key=lambda name: -self.layers[name].weight_shape.numel()):
            by_owner.setdefault(self.owners[name], []).append(name)
        return [list(filter(None, names)) for names in itertools.zip_longest(*by_owner.values())]

    def read(self, name: str, device: torch.device) -> Tensor | None:
        """Return the fp32 value to merge into: a new tensor on the owner, None elsewhere. Collective."""
        mine = self.owners[name] == dist.get_rank()
        if self.with_masters:
            return self.masters.read(name, device) if mine else None
        weight: Any = self.layers[name].weight
        with GatheredParameters([weight], enabled=is_partitioned(weight)):
            return self.dequantize(name, weight.detach().to(device, copy=True)) if mine else None

    def keep(self, name: str, value: Tensor) -> None:
        """Make `value`, fp32, the new master, on the owner. What `masters.hold` gave out stays as it is."""
        if self.with_masters:
            self.masters.put(name, value)

    def quantize(self, value: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the stored copy of an fp32 weight. generator: round without bias where the format can (bf16)."""
        if generator is not None and self.format.floating_dtype(self.dtype) == torch.bfloat16:
            value = round_unbiased(value, generator)
        return self.format.quantize(value, self.dtype)

    def can_store(self, value: Tensor) -> Tensor:
        """Return whether an fp32 weight is finite, and its stored copy too (fp16 ends at 65504): a bool scalar."""
        return torch.isfinite(value.to(self.format.floating_dtype(self.dtype) or value.dtype)).all()

    def dequantize(self, name: str, stored: Tensor) -> Tensor:
        """Return the fp32 weight `[..., out, in]` that a stored copy stands for."""
        return self.format.dequantize(stored, self.layers[name].weight_shape, torch.float32)

    def add(self, name: str, base: Tensor, change: Tensor, key: str) -> tuple[Tensor, Tensor]:
        """Add `change` to an owned weight, `base` of `read`, which is used up, and keep it as the master.

        key: of the rounding at random, where there is no master.

        Returns the stored copy, and the ledger's samples of the change and of what the stored copy lost of it.
        """
        ledger = self.ledgers[name]
        before = ledger.sample(self.dequantize(name, self.quantize(base)) if self.with_masters else base)
        intended = ledger.sample(change)
        base.add_(change)
        stored = self.quantize(base, None if self.with_masters else keyed_generator(key, base.device))
        self.keep(name, base)
        lost = ledger.sample(self.dequantize(name, stored)).sub_(before).sub_(intended)
        return stored, torch.stack([intended, lost])

    def add_to_ledgers(self, samples: dict[str, Tensor]) -> None:
        """Add changes of owned weights, `[2, n]` on the device: a ledger's samples of what was intended and lost."""
        if not samples:
            return
        on_host = torch.cat([*samples.values()], dim=1).cpu()  # in one copy
        columns = on_host.split([sample.shape[1] for sample in samples.values()], dim=1)
        for name, (intended, lost) in zip(samples, columns, strict=True):
            self.ledgers[name].add(intended, lost)

    def publish(self, name: str, stored: Tensor | None, device: torch.device) -> None:
        """Broadcast the owner's stored copy and put it (at ZeRO-3: this rank's piece of it) where forward reads it."""
        assert (stored is None) == (self.owners[name] != dist.get_rank()), "the owner sends, and nobody else"
        if stored is None:
            stored = self.format.stored_like(self.layers[name].weight_shape, self.dtype, device)
        dist.broadcast(stored, self.owners[name])
        self.put(name, stored)

    def put(self, name: str, stored: Tensor) -> None:
        """Put a stored copy, equal on all ranks (at ZeRO-3: this rank's piece of it), where forward reads it."""
        weight: Any = self.layers[name].weight
        if is_partitioned(weight):
            write_partition(weight, stored)
        else:
            weight.data.copy_(stored)

    def stored_fp32(self, name: str) -> tuple[Tensor, int]:
        """Return what this rank stores of a weight in fp32: 1-D, writable; and the element of W that it begins at."""
        weight: Any = self.layers[name].weight
        start, stored = 0, weight.data
        if is_partitioned(weight):
            start, stop = partition_range(weight)
            stored = weight.ds_tensor.data[: stop - start]
        if stored.dtype == torch.uint8:  # packed, and padded at its end
            stored, start = stored.view(torch.float32), start // 4
        return stored.view(-1)[: max(0, self.layers[name].weight_shape.numel() - start)], start

    def read_A(self, name: str) -> Tensor:
        """Return a one-sided layer's A as forward reads it, in fp32: a new tensor on every rank. Collective."""
        lora_A: Any = self.lowrank[name].lora_A
        with GatheredParameters([lora_A], enabled=is_partitioned(lora_A)):
            return lora_A.detach().to(torch.float32, copy=True)

    def publish_A(self, name: str, value: Tensor | None) -> None:
        """Broadcast the owner's new A of a one-sided layer, rounded to what forward reads, to where it reads it."""
        layer = self.lowrank[name]
        lora_A: Any = layer.lora_A
        if value is None:
            stored = torch.empty(layer.shape_of_A, dtype=self.dtype, device=self.device)
        else:
            stored = value.to(self.device, self.dtype).contiguous()
        dist.broadcast(stored, self.owners[name])
        if is_partitioned(lora_A):
            write_partition(lora_A, stored)
        else:
            lora_A.data.copy_(stored)

    def take(self, name: str, value: Tensor | None) -> None:
        """Make the owner's fp32 `value` (None elsewhere) the master and the stored copy. Collective."""
        stored = None
        if value is not None:
            self.keep(name, value)
            stored = self.quantize(value.to(self.device))
        self.publish(name, stored, self.device)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 shards the parameter."""
    return hasattr(parameter, "ds_tensor")


def _all_ranks_multiply_fp8(device: torch.device) -> bool:
    able = torch.tensor(int(multiplies_fp8(device)), device=device)
    dist.all_reduce(able, op=dist.ReduceOp.MIN)
    return bool(able)

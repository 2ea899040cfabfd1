"""Take an engine's state out of it, for a checkpoint: written against the shard view, so it knows no ZeRO stage.

Each rank contributes the ranges of the fp32 masters and Adam moments that it owns, under names; any number of ranks, at
any stage, reads the ranges that it needs (`zero.restore`).
"""

import dataclasses
import functools
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.checkpoint.contents import BUFFER, ISLAND_PART, OWNER_STATE, PARTS, RESIDUAL_SUM, Captured, Ranges
from relora_ds.lowrank.wrap import full_shape, owned_layers
from relora_ds.zero.engine_state import engine_state
from relora_ds.zero.frozen_master import assign_owners
from relora_ds.zero.frozen_state import frozen_state
from relora_ds.zero.pinned import HostCopies, Lazy
from relora_ds.zero.plain_model import own_generation_config, persistent_buffers
from relora_ds.zero.shards import Shard

# Of a model's configuration: what changes nothing that it computes.
_ELSEWHERE = ("dtype", "torch_dtype", "transformers_version", "use_cache", "architectures", "name_or_path")


class EngineSource:
    """What `checkpoint.writer` writes the checkpoints of an engine from; see `checkpoint.contents.Source`."""

    def __init__(self, engine):
        self._engine = engine
        self._copies = HostCopies(pinned=engine.device.type == "cuda")

    @property
    def cycle(self) -> int:
        return cycle_of(self._engine)

    def capture(self, peers: list[int], with_frozen: bool) -> Captured:
        return capture(self._engine, peers, with_frozen, self._copies)

    def write_config(self, directory: Path) -> list[str]:
        module, written = self._engine.module, []
        if hasattr(getattr(module, "config", None), "save_pretrained"):
            module.config.save_pretrained(directory)
            written.append("config.json")
            if own_generation_config(module):
                module.generation_config.save_pretrained(directory)
                written.append("generation_config.json")
        return written


def cycle_of(engine) -> int:
    """Return how often the frozen weights of an engine have changed."""
    others = engine.t if engine.owned_state is not None else 0 if engine.residual is None else engine.residual.count
    return len(engine.restarts) + others


@torch.no_grad()
def capture(engine, peers: list[int], with_frozen: bool, copies: HostCopies | None = None) -> Captured:
    """Copy this rank's part of the state to the CPU. Collective.

    Args:
        peers: the ranks that share this rank's directory, this one among them; where every rank holds everything
            (stage 0) they divide it among themselves.
        with_frozen: also what is frozen.
        copies: where to; what was captured into it before is overwritten.
    """
    rank, shards = dist.get_rank(), engine.shards
    owners = {}
    if not shards.partitioned:
        owners = assign_owners({shard.name: shard.numel for shard in shards}, len(peers))
    trained: dict[str, Tensor | Lazy] = {}
    ranges: Ranges = {}
    for shard in shards:
        if shard.start < shard.stop and peers[owners.get(shard.name, peers.index(rank))] == rank:
            ranges[shard.name] = (shard.start, shard.stop)
            trained |= {f"{part}/{shard.name}": _tensor_or_read(shard, part) for part in PARTS}
    copied = (copies or HostCopies(pinned=engine.device.type == "cuda")).take(trained)
    if rank == 0:
        copied |= {
            BUFFER + name: buffer.to("cpu", copy=True) for name, buffer in persistent_buffers(engine.module).items()
        }
    if engine.residual is not None:
        copied |= {RESIDUAL_SUM + name: value for name, value in engine.residual.hold().items()}
    if engine.owned_state is not None:
        copied |= {OWNER_STATE + name: value for name, value in engine.owned_state.held().items()}
    if engine.exchange is not None:
        copied |= {ISLAND_PART + name: value for name, value in engine.exchange.held().items()}
    return Captured(
        copied, ranges, frozen_state(engine) if with_frozen else None, engine_state(engine), description(engine)
    )


def _tensor_or_read(shard: Shard, part: str) -> Tensor | Lazy:
    """Return a part of a shard, or how to read it where that makes a copy, which is not to be one of many."""
    if part == "master" or shard.moment(part).is_view:
        return shard.read(part)
    return Lazy(shard.stop - shard.start, functools.partial(shard.read, part))


def description(engine) -> dict:
    """Return what a manifest says about the model of an engine."""
    layers = owned_layers(engine.module)
    bases = {f"{name}.lora_A" for name in engine.frozen.one_sided}  # no parameters at times; the layers tell of them
    return {
        "parameters": {
            name: {"shape": list(full_shape(p)), "trains": p.requires_grad}
            for name, p in engine.module.named_parameters()
            if name not in bases
        },
        "layers": {name: layer.about() for name, layer in layers.items()},
        "frozen": dataclasses.asdict(engine.frozen.storage),
        "config": _configuration(engine.module),
        "relora": None if engine.relora is None else dataclasses.asdict(engine.relora),
    }


def _configuration(module) -> dict:
    """Return what decides the function of a transformers model; networks of the same shapes may differ in it."""
    if not hasattr(getattr(module, "config", None), "to_dict"):
        return {}
    found = json.loads(json.dumps(module.config.to_dict(), default=str))
    return {name: value for name, value in found.items() if name not in _ELSEWHERE and not name.startswith("_")}

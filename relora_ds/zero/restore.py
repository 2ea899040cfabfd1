"""Put the state in a checkpoint into an engine of any ZeRO stage, number of ranks, precision and frozen format."""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from relora_ds.checkpoint.contents import BUFFER, OTHER, PARTS, STORED
from relora_ds.checkpoint.manifest import FROZEN, TRAINED, DamagedError, Manifest, UnreadableError
from relora_ds.checkpoint.tensors import SavedTensors
from relora_ds.lowrank.storage import Storage
from relora_ds.zero.capture import description
from relora_ds.zero.engine_state import restore_engine_state
from relora_ds.zero.frozen_state import other_parameters, restore_frozen_state
from relora_ds.zero.plain_model import persistent_buffers


def problems(manifest: Manifest, engine) -> list[str]:
    """Return why an engine cannot resume from a checkpoint: another network, or a format that cannot be converted."""
    found, now = [], json.loads(json.dumps(description(engine)))
    saved = manifest.model
    for what in ("parameters", "layers"):
        old, new = saved[what], now[what]
        stored = {f"{name}.weight" for name in engine.frozen.layers}  # flat, where it is packed; see the layers' shapes
        differ = [name for name in sorted({*old, *new} - stored) if old.get(name) != new.get(name)]
        if differ:
            found.append(
                f"{len(differ)} {what} are others (first: {differ[0]}, was {old.get(differ[0])}, is "
                f"{new.get(differ[0])})"
            )
    old, new = saved["config"], now["config"]
    found += [
        f"the model's {name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    storage, current = Storage(**saved["frozen"]), engine.frozen.storage
    if engine.frozen.layers and not (storage.with_masters or storage.exact or storage.same_bytes(current)):
        found.append(
            f"relora.frozen_dtype was {storage}, is {current}, and without fp32 masters (frozen_master: none) "
            "what was rounded once would be rounded again; resume with the format of the checkpoint"
        )
    return found


@torch.no_grad()
def restore(engine, directory: Path, manifest: Manifest, *, optimizer: bool = True, schedule: bool = True) -> None:
    """Put a checkpoint into an engine that `problems` finds nothing wrong with. Collective.

    Args:
        optimizer: with Adam's moments, its steps and the loss scale.
        schedule: with the steps and the restarts so far.

    Raises:
        DamagedError: on every rank, where one of them does not see a file that it needs. Nothing has been changed then.
    """
    shards, storage = engine.shards, Storage(**manifest.model["frozen"])
    with ExitStack() as stack:
        try:
            saved = SavedTensors(directory, manifest, stack)
            lack = _lack(saved, engine)
        except (DamagedError, UnreadableError) as error:  # the other ranks wait for word
            lack = str(error)
        lacking = [lack] * dist.get_world_size()
        dist.all_gather_object(lacking, lacking[0])
        if any(lacking):
            raise DamagedError(next(filter(None, lacking)))
        if engine.frozen.layers or any(not p.requires_grad for p in engine.module.parameters()):
            restore_frozen_state(engine, saved.read, storage)
        shards.drop_gathered_copies()
        parts = PARTS if optimizer else PARTS[:1]
        if optimizer:
            shards.zero_moments()
        for shard in shards:
            for part in parts:
                shard.write(part, saved.read_range(part, shard.name, shard.start, shard.stop), shard.start)
        for name, buffer in persistent_buffers(engine.module).items():
            value = saved.read(BUFFER + name).to(buffer.device) if dist.get_rank() == 0 else torch.empty_like(buffer)
            dist.broadcast(value.contiguous().reshape(-1).view(torch.uint8), 0)
            buffer.copy_(value)
    for name in shards.names:  # what forward reads, from masters that are all in place now
        shards.write(name, shards.gather([name])[name])
    restore_engine_state(engine, manifest.engine, optimizer=optimizer, schedule=schedule)


def _lack(saved: SavedTensors, engine) -> str | None:
    """Return what this rank's part of an engine needs and this host does not see; None where it sees everything."""
    for shard in engine.shards:
        if not saved.has_range(shard.name, shard.start, shard.stop):
            return saved.reason(shard.name, TRAINED)
    for name in engine.frozen.owned():
        if not (saved.has(f"{name}.weight") or saved.has(f"{STORED}{name}.weight")):
            return saved.reason(f"{name}.weight", FROZEN)
        if name in engine.frozen.one_sided and not saved.has(f"{OTHER}{name}.lora_A"):
            return saved.reason(f"{name}.lora_A", FROZEN)
    if dist.get_rank() == 0:
        others = [OTHER + name for name, _ in other_parameters(engine)]
        buffers = [BUFFER + name for name in persistent_buffers(engine.module)]
        for name in (*others, *buffers):
            if not saved.has(name):
                return saved.reason(name, FROZEN if name in others else TRAINED)
    return None

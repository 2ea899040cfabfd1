"""Put the state in a checkpoint into an engine of any ZeRO stage, number of ranks, precision and frozen format."""

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from relora_ds.checkpoint.contents import (
    BUFFER,
    ISLAND_PART,
    ISLANDS,
    OTHER,
    OWNER_STATE,
    OWNERS,
    PARTS,
    RESIDUAL,
    RESIDUAL_SUM,
    STORED,
)
from relora_ds.checkpoint.manifest import FROZEN, TRAINED, DamagedError, Manifest, UnreadableError
from relora_ds.checkpoint.tensors import SavedTensors
from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.inventory import is_lora_parameter
from relora_ds.lowrank.storage import Storage
from relora_ds.zero.capture import description
from relora_ds.zero.engine_state import restore_engine_state
from relora_ds.zero.frozen_state import other_parameters, restore_frozen_state
from relora_ds.zero.plain_model import persistent_buffers
from relora_ds.zero.subspaces import begin_chain

_CHAIN = ("trains", "r", "lora_alpha", "use_rslora")  # of a ReLoRAConfig: what decides the factors


def problems(manifest: Manifest, engine, *, optimizer: bool = True) -> list[str]:
    """Return why an engine cannot resume from a checkpoint: another network, or a format that cannot be converted.

    optimizer: the state of the optimizer is to be restored as well.
    """
    found, now = [], json.loads(json.dumps(description(engine)))
    saved = manifest.model
    if reason := _chain_problem(manifest, engine) or (_period_problem(manifest, engine) if optimizer else None):
        found.append(reason)
    for what in ("parameters", "layers"):
        old, new = saved[what], now[what]
        if _chain_changes(manifest, engine):
            old, new = _without_chain(old), _without_chain(new)
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
        for name in sorted({*old, *new} - {"auto_map"})  # saving writes it: where the code is that comes along
        if old.get(name) != new.get(name)
    ]
    owned = engine.owned_state
    if owned is not None and (was := manifest.engine.get(OWNERS)) != (asked := owned.about()):
        found.append(f"{owned.argument} was {was}, is {asked}; resume with the settings of the checkpoint")
    storage, current = Storage(**saved["frozen"]), engine.frozen.storage
    if engine.frozen.layers and not (storage.with_masters or storage.exact or storage.same_bytes(current)):
        found.append(
            f"relora.frozen_dtype was {storage}, is {current}, and without fp32 masters (frozen_master: none) "
            "what was rounded once would be rounded again; resume with the format of the checkpoint"
        )
    return found


def _chain_changes(manifest: Manifest, engine) -> list[str]:
    """Return how the factors of a checkpoint differ from those of an engine; [] where they are alike.

    Of layers without a base B is no update that a restart could have merged: such factors have no beginning here.
    """
    layers, saved = engine.frozen.lowrank.values(), manifest.model["relora"]
    if not saved or not layers or any(layer.weight is None for layer in layers):
        return []
    was, now = _chain_of(saved), _chain_of(dataclasses.asdict(engine.relora))
    if was["trains"] == "none":
        return []
    return [f"relora.{name} was {was[name]}, is {now[name]}" for name in _CHAIN if was[name] != now[name]]


def _chain_of(relora: dict[str, Any]) -> dict[str, Any]:
    """Return what of a config decides the factors; earlier versions had fewer names."""
    return {name: relora.get(name, getattr(ReLoRAConfig, name)) for name in _CHAIN}


def _chain_problem(manifest: Manifest, engine) -> str | None:
    """Return why another chain cannot begin from a checkpoint: an update of the old one is not merged yet."""
    t, restarts = (manifest.engine["scheduler"][key] for key in ("t", "restarts"))
    last = restarts[-1] if restarts else 0
    if t == last or not (changes := _chain_changes(manifest, engine)):
        return None
    return (
        f"{' and '.join(changes)}, which can change directly after a restart only; resume from step "
        f"{manifest.step - t + last}, or change it back"
    )


def _period_problem(manifest: Manifest, engine) -> str | None:
    """Return why what a period of residual updates has summed up would be lost."""
    steps = _residual_steps(manifest)
    was = (manifest.model["relora"] or {}).get("residual_every")
    now = None if engine.relora is None else engine.relora.residual_every
    if not steps or was == now:
        return None
    return (
        f"relora.residual_every was {was}, is {now}, which can change at the end of a period only; resume from step "
        f"{manifest.step - steps}, or change it back"
    )


def _without_chain(described: dict[str, dict]) -> dict[str, dict]:
    """Return parameters or layers without what another chain may have otherwise."""
    return {
        name: {key: value for key, value in about.items() if key not in ("one_sided", "scaling")}
        for name, about in described.items()
        if not is_lora_parameter(name)
    }


@torch.no_grad()
def restore(engine, directory: Path, manifest: Manifest, *, optimizer: bool = True, schedule: bool = True) -> None:
    """Put a checkpoint into an engine that `problems` finds nothing wrong with. Collective.

    Args:
        optimizer: with Adam's moments, its steps and the loss scale.
        schedule: with the steps and the restarts so far.

    Where the engine has other factors, these begin as they do after a restart, without moments.

    Raises:
        DamagedError: on every rank, where one of them does not see a file that it needs. Nothing has been changed then.
    """
    shards, storage = engine.shards, Storage(**manifest.model["frozen"])
    begins_chain = bool(_chain_changes(manifest, engine))
    with ExitStack() as stack:
        try:
            saved = SavedTensors(directory, manifest, stack)
            lack = _lack(saved, engine, begins_chain, optimizer, bool(optimizer and _residual_steps(manifest)))
        except (DamagedError, UnreadableError) as error:  # the other ranks wait for word
            lack = str(error)
        lacking = [lack] * dist.get_world_size()
        dist.all_gather_object(lacking, lacking[0])
        if any(lacking):
            raise DamagedError(next(filter(None, lacking)))
        if engine.frozen.layers or any(not p.requires_grad for p in engine.module.parameters()):
            restore_frozen_state(engine, saved.read, storage, with_bases=not begins_chain)
        shards.drop_gathered_copies()
        parts = PARTS if optimizer else PARTS[:1]
        if optimizer:
            shards.zero_moments()
        for shard in shards:
            if begins_chain and is_lora_parameter(shard.name):
                continue
            for part in parts:
                shard.write(part, saved.read_range(part, shard.name, shard.start, shard.stop), shard.start)
        for name, buffer in persistent_buffers(engine.module).items():
            value = saved.read(BUFFER + name).to(buffer.device) if dist.get_rank() == 0 else torch.empty_like(buffer)
            dist.broadcast(value.contiguous().reshape(-1).view(torch.uint8), 0)
            buffer.copy_(value)
        if engine.residual is not None:
            steps = _residual_steps(manifest) if optimizer else 0
            engine.residual.restore(steps, lambda name: saved.read(RESIDUAL_SUM + name))
        if engine.owned_state is not None:
            engine.owned_state.restore((lambda name: saved.read(OWNER_STATE + name)) if optimizer else None)
        if engine.exchange is not None:
            engine.exchange.restore(
                manifest.engine.get(ISLANDS) if schedule else None,
                manifest.engine["scheduler"]["t"] if schedule else 0,
                lambda name: saved.read(ISLAND_PART + name) if saved.has(ISLAND_PART + name) else None,
            )
    if begins_chain:
        begin_chain(shards, engine.frozen, engine.seed, len(manifest.engine["scheduler"]["restarts"]))
    for name in shards.names:  # what forward reads, from masters that are all in place now
        shards.write(name, shards.gather([name])[name])
    restore_engine_state(engine, manifest.engine, optimizer=optimizer, schedule=schedule)
    if begins_chain:
        shards.begin_adam(filter(is_lora_parameter, shards.names))


def _residual_steps(manifest: Manifest) -> int:
    """Return how many steps the sums of gradients in a checkpoint have; 0 where there are none."""
    return manifest.engine.get(RESIDUAL, {"steps": 0})["steps"]


def _lack(saved: SavedTensors, engine, begins_chain: bool, optimizer: bool, with_residual: bool) -> str | None:
    """Return what this rank's part of an engine needs and this host does not see; None where it sees everything."""
    for shard in engine.shards:
        if begins_chain and is_lora_parameter(shard.name):
            continue
        if not saved.has_range(shard.name, shard.start, shard.stop):
            return saved.reason(shard.name, TRAINED)
    for name in engine.frozen.owned():
        if not (saved.has(f"{name}.weight") or saved.has(f"{STORED}{name}.weight")):
            return saved.reason(f"{name}.weight", FROZEN)
        if name in engine.frozen.one_sided and not begins_chain and not saved.has(f"{OTHER}{name}.lora_A"):
            return saved.reason(f"{name}.lora_A", FROZEN)
        if with_residual and engine.residual is not None and not saved.has(RESIDUAL_SUM + name):
            return saved.reason(RESIDUAL_SUM + name, TRAINED)
    for name in engine.owned_state.names() if optimizer and engine.owned_state is not None else ():
        if not saved.has(OWNER_STATE + name):
            return saved.reason(OWNER_STATE + name, TRAINED)
    if dist.get_rank() == 0:
        others = [OTHER + name for name, _ in other_parameters(engine)]
        buffers = [BUFFER + name for name in persistent_buffers(engine.module)]
        for name in (*others, *buffers):
            if not saved.has(name):
                return saved.reason(name, FROZEN if name in others else TRAINED)
    return None

"""Universal checkpoints: what `python -m deepspeed.checkpoint.ds_to_universal` makes of a DeepSpeed checkpoint.

They hold what trains, one directory of files for each parameter, and drop the frozen weights. Those are in the files
that `engine.save_checkpoint` wrote beside DeepSpeed's, `relora_*`, which have to be copied along:

    cp CHECKPOINTS/global_step1000/relora_* CHECKPOINTS/global_step1000_universal/
"""

from pathlib import Path

import torch
import torch.distributed as dist

from relora_ds.lowrank.storage import Storage
from relora_ds.zero import checkpoint_files, checkpoint_model
from relora_ds.zero.engine_state import restore_engine_state
from relora_ds.zero.frozen_state import restore_others
from relora_ds.zero.shards import MOMENTS

LATEST = "latest_universal"
# In DeepSpeed's file of model states; everything else is the client's.
_DEEPSPEED = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "sparse_tensor_module_names",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_version",
    "universal_checkpoint_info",
}


def is_universal(directory: Path) -> bool:
    """Return True for a directory that `ds_to_universal` made."""
    return (directory / checkpoint_model.UNIVERSAL).is_dir()


@torch.no_grad()
def load(engine, directory: Path) -> dict:
    """Put a universal checkpoint of any ZeRO stage, world size and precision into an engine; returns client_state.

    Collective.

    Raises:
        ValueError: on every rank and before anything is overwritten: our files were not copied along; the frozen
            weights have no fp32 values; the network is another one.
    """
    found: list = [None] * dist.get_world_size()
    try:
        about, saved, mine = *_read(engine, directory), None
    except ValueError as error:  # the other ranks wait for word
        mine = str(error)
    dist.all_gather_object(found, mine)
    if any(found):
        raise ValueError(next(filter(None, found)))
    engine.shards.drop_gathered_copies()
    engine.frozen.publish_masters({name: saved.frozen[f"{name}.weight"] for name in engine.frozen.owned()})
    checkpoint_files.restore_ledgers(directory, engine.frozen)
    restore_others(engine, lambda name: saved.frozen[name])
    for shard in engine.shards:
        engine.shards.write(shard.name, saved.trained[shard.name])
        for moment in MOMENTS:
            getattr(shard, moment).copy_(shard.slice(checkpoint_model.universal_tensor(directory, shard.name, moment)))
    restore_engine_state(engine, about["engine"])
    states = checkpoint_model.model_states(directory, about)[0]
    return {key: value for key, value in states.items() if key not in _DEEPSPEED}


def _read(engine, directory: Path) -> tuple[dict, checkpoint_model.SavedModel]:
    """Description and weights, if everything is there and fits."""
    if not (directory / checkpoint_model.DESCRIPTION).is_file():
        raise ValueError(
            f"load_checkpoint: {directory} has none of the files relora_*, so merges would be lost; copy "
            "them there from the checkpoint that it was made of"
        )
    about = checkpoint_model.read_description(directory)
    storage = Storage(**about["frozen"])
    if engine.frozen.layers and not (storage.with_masters or storage.exact):
        raise ValueError(
            "relora.frozen_master: none, and a universal checkpoint cannot take stored copies along; load "
            "the checkpoint that it was made of"
        )
    saved = checkpoint_model.read_model(directory)
    shapes = {shard.name: shard.shape for shard in engine.shards}
    if {name: value.shape for name, value in saved.trained.items()} != shapes:
        raise ValueError(f"load_checkpoint: {directory} is of another network, or other parts of it train")
    for name in saved.trained:
        for moment in MOMENTS:
            if not (path := checkpoint_model.universal_file(directory, name, moment)).is_file():
                raise ValueError(f"load_checkpoint: {path} is missing; convert the checkpoint again")
    return about, saved

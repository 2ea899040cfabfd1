"""The model inside a checkpoint, read by one ordinary process on the CPU: no engine, no process group.

Of a run's checkpoints, and of those that `engine.save_checkpoint` writes in DeepSpeed's format.
"""

from contextlib import ExitStack
from pathlib import Path

import torch

from relora_ds.checkpoint import manifest, store
from relora_ds.checkpoint.state import BUFFER, SavedTensors
from relora_ds.zero import checkpoint_model
from relora_ds.zero.checkpoint_model import SavedModel
from relora_ds.zero.frozen_master import Storage
from relora_ds.zero.frozen_state import OTHER, STORED


def is_checkpoint(directory: Path) -> bool:
    """Whether `read_model` can read it, as far as one look tells."""
    return any((directory / name).is_file() for name in (manifest.NAME, checkpoint_model.DESCRIPTION))


def read_model(directory: Path) -> SavedModel:
    """Read the checkpoint of one step, of any ZeRO stage, precision and world size.

    Raises:
        ValueError: it is no checkpoint of ours, or incomplete; names the missing file or weights.
    """
    if (directory / checkpoint_model.DESCRIPTION).is_file():
        return checkpoint_model.read_model(directory)
    if found := store.verify(directory):
        raise ValueError(found[0])
    about = manifest.read(directory)
    storage, layers = Storage(**about.model["frozen"]), about.model["layers"]
    with ExitStack() as stack:
        saved = SavedTensors(directory, about, stack)
        shapes = {name: torch.Size(p["shape"]) for name, p in about.model["parameters"].items() if p["trains"]}
        trained = {name: saved.read_range("master", name, 0, shape.numel()).view(shape)
                   for name, shape in shapes.items()}
        frozen = {name.removeprefix(prefix): saved.read(name) for prefix in (OTHER, BUFFER)
                  for name in saved.names(prefix)}
        for name in (name for name, layer in layers.items() if layer["base"]):
            key = f"{name}.weight"
            frozen[key] = saved.read(key) if storage.with_masters or storage.exact else \
                storage.dequantize(saved.read(STORED + key), torch.Size(layers[name]["shape"]))
    frozen = {name: value.float() if value.is_floating_point() else value for name, value in frozen.items()}
    schedule = about.engine["scheduler"]
    return SavedModel(schedule["t"], schedule["restarts"], about.model["relora"], layers, trained, frozen)

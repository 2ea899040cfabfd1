"""The model inside a checkpoint, read by one ordinary process on the CPU: no engine, no process group.

Of a run's checkpoints, and of those that `engine.save_checkpoint` writes in DeepSpeed's format.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relora_ds.checkpoint import manifest, store
from relora_ds.checkpoint.contents import BUFFER, OTHER, STORED
from relora_ds.checkpoint.manifest import Manifest, is_needed
from relora_ds.checkpoint.tensors import SavedTensors
from relora_ds.lowrank.storage import Storage
from relora_ds.zero import checkpoint_model
from relora_ds.zero.checkpoint_model import SavedModel, merged_weight, plain_shapes


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, without a weight of it.

    Attributes:
        step: applied steps of the run; in DeepSpeed's format those of the engine.
        t, restarts, relora, layers: see `SavedModel`.
        matrices: `{module name: shape}` of every 2-D weight, those of embeddings and head among them; of a low-rank
            layer `[out, in]`, however it is stored and whether it has a base or not.
    """

    step: int
    t: int
    restarts: list[int]
    relora: dict | None
    layers: dict[str, dict]
    matrices: dict[str, torch.Size]


@dataclass(frozen=True)
class OpenModel:
    """The weights in a checkpoint, each read when it is asked for; fp32 on CPU. See `open_model`.

    Attributes:
        trained, frozen: names of the tensors, as in `SavedModel`.
        read: a tensor by its name; it may be the file's own memory, and is not to be changed.
    """

    contents: Contents
    trained: list[str]
    frozen: list[str]
    read: Callable[[str], Tensor]

    def base(self, name: str) -> Tensor:
        """The weight of a low-rank layer without its current update; 0 where it has none."""
        layer = self.contents.layers[name]
        return self.read(f"{name}.weight") if layer["base"] else torch.zeros(layer["shape"])

    def merged(self, name: str) -> Tensor:
        """The weight of one of `contents.matrices`, of a low-rank layer `W + s·B·A`; a new tensor."""
        layer = self.contents.layers.get(name)
        if layer is None:
            return self.read(f"{name}.weight").clone()
        return merged_weight(layer, self.read(f"{name}.weight") if layer["base"] else None, *self.factors(name))

    def update(self, name: str) -> Tensor:
        """`s·B·A [out, in]` of a low-rank layer: what the current cycle adds to its `W`."""
        return merged_weight(self.contents.layers[name], None, *self.factors(name))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """`lora_A [r, in]` and `lora_B [out, r]` of a low-rank layer."""
        return self.read(f"{name}.lora_A"), self.read(f"{name}.lora_B")


class CheckpointWeights:
    """The plain model in the checkpoint of one step, read one tensor at a time: a source of weights.

    A checkpoint in DeepSpeed's format is read whole on the one rank that reads it.

    Attributes:
        contents: what is in the checkpoint.
        shapes: of every parameter (tied ones once) and persistent buffer, by name.
        owners: None: every rank can read all; in DeepSpeed's format rank 0 for all.
    """

    def __init__(self, directory: Path, updates: bool = True):
        """Open it. updates: `W + s·B·A` for the low-rank layers, not `W`. Errors: see `open_model`."""
        self._files, self._updates = ExitStack(), updates
        if _is_of_deepspeed(directory):
            self._open: Callable[[], OpenModel] = functools.cache(
                lambda: self._files.enter_context(open_model(directory))
            )
            self.contents = contents_of(directory)
            self.shapes: Mapping[str, torch.Size] = checkpoint_model.shapes_of(directory)
            self.owners: Mapping[str, int] | None = dict.fromkeys(self.shapes, 0)
            return
        model = self._files.enter_context(open_model(directory))
        self._open, self.contents, self.owners = lambda: model, model.contents, None
        described = manifest.read(directory).model
        buffers = [name for name in model.frozen if name not in described["parameters"]]
        self.shapes = plain_shapes(described, {name: model.read(name).shape for name in buffers})

    def read(self, name: str) -> Tensor:
        """A new tensor, fp32 where it is floating point."""
        model, layer = self._open(), name.removesuffix(".weight")
        if f"{layer}.weight" != name or layer not in self.contents.layers:
            return model.read(name).clone()
        return model.merged(layer) if self._updates else model.base(layer).clone()

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """`lora_A [r, in]` and `lora_B [out, r]` of a low-rank layer."""
        return self._open().factors(name)


def is_checkpoint(directory: Path) -> bool:
    """Whether `read_model` can read it, as far as one look tells."""
    return any((directory / name).is_file() for name in (manifest.NAME, checkpoint_model.DESCRIPTION))


def contents_of(directory: Path) -> Contents:
    """What is in the checkpoint of one step; its weights are neither read nor verified.

    Raises:
        ValueError: it is no checkpoint of ours.
    """
    if _is_of_deepspeed(directory):
        about = checkpoint_model.read_description(directory)
        return _contents(about["t"], about, about)
    about = manifest.read(directory)
    return _contents(about.step, about.engine["scheduler"], about.model)


@contextmanager
def open_model(directory: Path) -> Iterator[OpenModel]:
    """Open the checkpoint of one step, of any ZeRO stage, precision and world size, to read one tensor after the other.

    A checkpoint of a run costs the memory of what is asked for; one in DeepSpeed's format, whose files hold flat
    partitions, is read whole.

    Raises:
        ValueError: it is no checkpoint of ours, or incomplete; names the missing file or weights.
    """
    contents = contents_of(directory)
    if _is_of_deepspeed(directory):
        saved = checkpoint_model.read_model(directory)
        tensors = {**saved.trained, **saved.frozen}
        yield OpenModel(contents, list(saved.trained), list(saved.frozen), tensors.__getitem__)
        return
    if found := store.verify(directory, is_needed):
        raise ValueError(found[0])
    about = manifest.read(directory)
    with ExitStack() as stack:
        yield _opened(contents, about, SavedTensors(directory, about, stack))


def read_model(directory: Path) -> SavedModel:
    """Read all of the checkpoint of one step. Arguments and errors: see `open_model`."""
    if _is_of_deepspeed(directory):
        return checkpoint_model.read_model(directory)
    with open_model(directory) as model:
        trained, frozen = ({name: model.read(name) for name in names} for names in (model.trained, model.frozen))
    about = model.contents
    return SavedModel(about.t, about.restarts, about.relora, about.layers, trained, frozen)


def _is_of_deepspeed(directory: Path) -> bool:
    return (directory / checkpoint_model.DESCRIPTION).is_file()


def _contents(step: int, schedule: dict, model: dict) -> Contents:
    layers, ending = model["layers"], ".weight"
    matrices = {
        name.removesuffix(ending): torch.Size(p["shape"])
        for name, p in model["parameters"].items()
        if name.endswith(ending) and len(p["shape"]) == 2
    }
    matrices |= {name: torch.Size(layer["shape"]) for name, layer in layers.items()}
    return Contents(step, schedule["t"], schedule["restarts"], model["relora"], layers, matrices)


def _opened(contents: Contents, about: Manifest, saved: SavedTensors) -> OpenModel:
    """A checkpoint of a run."""
    storage, layers = Storage(**about.model["frozen"]), contents.layers
    shapes = {name: torch.Size(p["shape"]) for name, p in about.model["parameters"].items() if p["trains"]}
    keys = {name.removeprefix(prefix): name for prefix in (OTHER, BUFFER) for name in saved.names(prefix)}
    stored = "" if storage.with_masters or storage.exact else STORED
    keys |= {f"{name}.weight": f"{stored}{name}.weight" for name, layer in layers.items() if layer["base"]}

    def read(name: str) -> Tensor:
        if name in shapes:
            return saved.read_range("master", name, 0, shapes[name].numel()).view(shapes[name])
        value = saved.read(keys[name])
        if keys[name].startswith(STORED):
            value = storage.dequantize(value, torch.Size(layers[name.removesuffix(".weight")]["shape"]))
        return value.float() if value.is_floating_point() else value

    return OpenModel(contents, list(shapes), list(keys), read)

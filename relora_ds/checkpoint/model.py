"""The model inside a checkpoint, read by one ordinary process on the CPU: no engine, no process group."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relora_ds.checkpoint import manifest, store
from relora_ds.checkpoint.contents import BUFFER, DECAY, OTHER, OWNERS, RESIDUAL, STORED
from relora_ds.checkpoint.manifest import Manifest, is_needed
from relora_ds.checkpoint.tensors import SavedTensors
from relora_ds.lowrank.frozen import merge_, plain_name
from relora_ds.lowrank.storage import Storage
from relora_ds.lowrank.wrap import is_lora_parameter


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, without a weight of it.

    Attributes:
        step: applied steps of the run, or of the loop that saved it.
        t, restarts: applied steps of the engine, and the steps after which it restarted.
        relora: the fields of its `ReLoRAConfig`, or None for a plain model.
        layers: `{name: LowRankLayer.about()}` of the layers with factors.
        matrices: `{module name: shape}` of every 2-D weight, those of embeddings and head among them; of a wrapped
            layer that of the plain weight, however it is stored and whether it has a base or not.
        decay: ρ, what weight decay has left of the frozen weights since they were written.
        has_first_base: nothing has been added to the weights below the factors: no restart, switch or residual update.
    """

    step: int
    t: int
    restarts: list[int]
    relora: dict | None
    layers: dict[str, dict]
    matrices: dict[str, torch.Size]
    decay: float = 1.0
    has_first_base: bool = True


@dataclass(frozen=True)
class OpenModel:
    """The weights in a checkpoint, each read when it is asked for; fp32 on CPU. See `open_model`.

    Attributes:
        trained: names of what trains, `lora_A` and `lora_B` included.
        frozen: names of everything else: the base weights of the current cycle, and what nothing trains.
        read: a tensor by its name; it may be the file's own memory, and is not to be changed.
    """

    contents: Contents
    trained: list[str]
    frozen: list[str]
    read: Callable[[str], Tensor]

    def base(self, name: str) -> Tensor:
        """Return the weight of a low-rank layer without its current update, `ρ·W`; 0 where it has none."""
        layer = self.contents.layers[name]
        if not layer["base"]:
            return torch.zeros(layer["shape"])
        weight, decay = self.read(f"{name}.weight"), self.contents.decay
        return weight if decay == 1 else weight * decay

    def merged(self, name: str) -> Tensor:
        """Return the weight of one of `contents.matrices`, of a low-rank layer `ρ·W + s·B·A`; a new tensor."""
        layer = self.contents.layers.get(name)
        if layer is None:
            return self.read(f"{name}.weight").clone()
        weight = self.read(f"{name}.weight") if layer["base"] else None
        return merged_weight(layer, weight, *self.factors(name), self.contents.decay)

    def update(self, name: str) -> Tensor:
        """`s·B·A` of a low-rank layer, in the shape of its weight: what the current cycle adds to its `W`."""
        return merged_weight(self.contents.layers[name], None, *self.factors(name))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """`lora_A [r, in]` and `lora_B [out, r]` of a low-rank layer."""
        return self.read(f"{name}.lora_A"), self.read(f"{name}.lora_B")


class CheckpointWeights:
    """The plain model in the checkpoint of one step, read one tensor at a time: a source of weights.

    Attributes:
        contents: what is in the checkpoint.
        shapes: of every parameter (tied ones once) and persistent buffer, by name.
        owners: None: every rank can read all.
    """

    def __init__(self, directory: Path, updates: bool = True):
        """Open it. updates: `W + s·B·A` for the low-rank layers, not `W`. Errors: see `open_model`."""
        self._files, self._updates = ExitStack(), updates
        model = self._files.enter_context(open_model(directory))
        self._model, self.contents, self.owners = model, model.contents, None
        self._layers = {plain_name(name, layer): name for name, layer in model.contents.layers.items()}
        described = manifest.read(directory).model
        buffers = [name for name in model.frozen if name not in described["parameters"] and not is_lora_parameter(name)]
        self.shapes = plain_shapes(described, {name: model.read(name).shape for name in buffers})

    def read(self, name: str) -> Tensor:
        """Return a new tensor, fp32 where it is floating point."""
        model, layer = self._model, self._layers.get(name)
        if layer is None:
            return model.read(name).clone()
        return model.merged(layer) if self._updates else model.base(layer).clone()

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """`lora_A [r, in]` and `lora_B [out, r]` of a low-rank layer."""
        return self._model.factors(name)


def is_checkpoint(directory: Path) -> bool:
    """Return True if a directory is a checkpoint, as far as one look tells."""
    return (directory / manifest.NAME).is_file()


def contents_of(directory: Path) -> Contents:
    """Return what is in a checkpoint; its weights are neither read nor verified.

    Raises:
        ValueError: it is none.
    """
    return _contents(manifest.read(directory))


@contextmanager
def open_model(directory: Path) -> Iterator[OpenModel]:
    """Open a checkpoint of any ZeRO stage, precision and world size, to read one tensor after the other.

    It is verified, and costs the memory of what is asked for.

    Raises:
        ValueError: it is no checkpoint, or damaged; names the file.
    """
    if found := store.verify(directory, is_needed):
        raise ValueError(found[0])
    about = manifest.read(directory)
    with ExitStack() as stack:
        yield _opened(about, SavedTensors(directory, about, stack))


def merged_weight(layer: dict, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, decay: float = 1.0) -> Tensor:
    """Return `ρ·W + s·B·A`, fp32, a new tensor; of a `weight` None, `s·B·A`. layer: of `Contents.layers`; decay: ρ."""
    start = torch.zeros(layer["shape"]) if weight is None else weight.clone()
    return merge_(layer, start, lora_A, lora_B, decay)


def plain_shapes(about: dict, buffers: dict[str, torch.Size]) -> dict[str, torch.Size]:
    """Return the shapes of a plain model's parameters and buffers, from what a manifest says about the trained one."""
    weights = {f"{name}.weight" for name in about["layers"]}
    return {
        **{
            name: torch.Size(p["shape"])
            for name, p in about["parameters"].items()
            if not is_lora_parameter(name) and name not in weights
        },
        **{plain_name(name, layer): torch.Size(layer["shape"]) for name, layer in about["layers"].items()},
        **buffers,
    }


def _contents(about: Manifest) -> Contents:
    schedule, model = about.engine["scheduler"], about.model
    layers = {name: layer for name, layer in model["layers"].items() if "scaling" in layer}
    ending = ".weight"
    matrices = {
        name.removesuffix(ending): torch.Size(p["shape"])
        for name, p in model["parameters"].items()
        if name.endswith(ending) and len(p["shape"]) == 2
    }
    matrices |= {
        name: torch.Size(layer["shape"]) for name, layer in model["layers"].items() if len(layer["shape"]) == 2
    }
    engine, restarts = about.engine, schedule["restarts"]
    has_first_base = not restarts and OWNERS not in engine and not engine.get(RESIDUAL, {"count": 0})["count"]
    return Contents(
        about.step, schedule["t"], restarts, model["relora"], layers, matrices, engine.get(DECAY, 1.0), has_first_base
    )


def _opened(about: Manifest, saved: SavedTensors) -> OpenModel:
    contents, storage = _contents(about), Storage(**about.model["frozen"])
    layers = about.model["layers"]
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

"""The model inside a checkpoint, read by one ordinary process on the CPU: no engine, no process group.

DeepSpeed's files hold flat partitions without names or scalings. So the engine writes a description beside
them (`relora_model.json`, and the model's `config.json`), and the reader puts the tensors together:

    what trains      the fp32 masters, from the optimizer's shards
    what is frozen   its fp32 masters where they exist (`relora_frozen_masters_*`), else the stored copy

DeepSpeed's own `zero_to_fp32` is of no use here: it has no stage 0, drops the frozen weights at stage 1, gives
their bf16 copies elsewhere, and unpickles anything. Here pickles are loaded with `weights_only`; the four
classes that DeepSpeed's files need are named below.
"""

import dataclasses
import json
import logging
import os
import pickle
from collections.abc import Container, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import safe_open
from torch import Tensor

from relora_ds.lowrank.frozen import add_update_
from relora_ds.lowrank.storage import Storage
from relora_ds.lowrank.wrap import full_shape, is_lora_parameter, lowrank_layers
from relora_ds.zero.checkpoint_files import MASTERS_GLOB, STORED
from relora_ds.zero.engine_state import engine_state
from relora_ds.zero.plain_model import own_generation_config, persistent_buffers

logger = logging.getLogger(__name__)

DESCRIPTION = "relora_model.json"
_KEYS = {"stage", "bf16", "world_size", "relora", "layers", "frozen", "parameters"}
UNIVERSAL = "zero"  # the directory in a universal checkpoint with what trains


def _stage_named(kind: type, name: str) -> ZeroStageEnum:
    """In place of `getattr`, which must not be called on behalf of a file."""
    if kind is not ZeroStageEnum:
        raise pickle.UnpicklingError(f"getattr of {kind}")
    return ZeroStageEnum[name]


# Early releases of Python 3.11 pickle the member of an enumeration as a call of getattr.
_SAFE = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum, (_stage_named, "builtins.getattr")]


def save_description(save_dir: str, tag: str, engine) -> None:
    """Write what a reader of the checkpoint `save_dir/tag` needs to know. Rank 0 writes; call it on every rank."""
    if dist.get_rank() != 0:
        return
    directory = Path(save_dir) / tag
    directory.mkdir(parents=True, exist_ok=True)
    module = engine.module
    names = {id(p): name for name, p in module.named_parameters()}
    description = {
        "stage": engine.zero_optimization_stage(),
        "bf16": engine.bfloat16_enabled(),  # decides the names of DeepSpeed's files
        "world_size": dist.get_world_size(),
        "t": engine.t,
        "restarts": list(engine.restarts),
        "engine": engine_state(engine),
        "relora": None if engine.relora is None else dataclasses.asdict(engine.relora),
        "layers": {
            name: {"scaling": layer.scaling, "base": layer.weight is not None, "shape": list(layer.weight_shape)}
            for name, layer in lowrank_layers(module).items()
        },
        "frozen": dataclasses.asdict(engine.frozen.storage),
        "parameters": {
            name: {"shape": list(full_shape(p)), "trains": p.requires_grad} for name, p in module.named_parameters()
        },
        "buffers": list(persistent_buffers(module)),
        # The order in the flat partitions of ZeRO-3 and of stage 0 in 16 bit; stages 1 and 2 store names themselves.
        "groups": [[names[id(p)] for p in group] for group in getattr(engine.optimizer, "fp16_groups", [])],
    }
    temporary = directory / f"{DESCRIPTION}.tmp"
    temporary.write_text(json.dumps(description, indent=1) + "\n")
    os.replace(temporary, directory / DESCRIPTION)
    if hasattr(module, "config") and hasattr(module.config, "save_pretrained"):
        module.config.save_pretrained(directory)
    if own_generation_config(module):
        module.generation_config.save_pretrained(directory)


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """The weights in a checkpoint, fp32 on CPU, under the names of the module that was trained.

    Attributes:
        t, restarts: applied steps of the engine, and the steps after which it restarted.
        relora: the fields of its `ReLoRAConfig`, or None for a plain model.
        layers: `{module name: {"scaling": s, "base": whether it has a frozen weight, "shape": [out, in]}}` of the
            low-rank layers.
        trained: the masters of everything that trains, `lora_A` and `lora_B` included.
        frozen: everything else: the base weights of the current cycle, and what nothing trains.
    """

    t: int
    restarts: list[int]
    relora: dict | None
    layers: dict[str, dict]
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor]

    def base(self) -> dict[str, Tensor]:
        """The plain model without its current update: `W` of every low-rank layer (0 where it has none)."""
        state = {name: value for name, value in {**self.trained, **self.frozen}.items() if not is_lora_parameter(name)}
        for name, layer in self.layers.items():
            if not layer["base"]:
                lora_A, lora_B = self.factors(name)
                state[f"{name}.weight"] = torch.zeros(lora_B.shape[0], lora_A.shape[1])
        return state

    def merged(self) -> dict[str, Tensor]:
        """The plain model: `W + s·B·A`; what `engine.collect_merged` gives at the same step, to the bit on a CPU."""
        state = self.base()
        for name, layer in self.layers.items():
            state[f"{name}.weight"] = merged_weight(layer, state[f"{name}.weight"], *self.factors(name))
        return state

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """`lora_A [r, in]` and `lora_B [out, r]` of a low-rank layer."""
        return self.trained[f"{name}.lora_A"], self.trained[f"{name}.lora_B"]


def merged_weight(layer: dict, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """`W + s·B·A`, fp32 `[out, in]`, a new tensor; of a `weight` None, `s·B·A`. layer: of `SavedModel.layers`."""
    start = torch.zeros(layer["shape"]) if weight is None else weight.clone()
    return add_update_(start, lora_A, lora_B, layer["scaling"])


def read_description(directory: Path) -> dict:
    """What `save_description` wrote.

    Raises:
        ValueError: the directory is no checkpoint of a relora_ds engine, or its description is damaged.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"{directory}: no checkpoint that a relora_ds engine wrote (it has no {DESCRIPTION}); name "
            "the directory of one step, such as RUN/checkpoints/step_00005000"
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict) or not about.keys() >= _KEYS:
            raise ValueError("it is no description of a model")
        return about
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); use another checkpoint") from error


def agreed_description(directory: Path) -> dict | None:
    """Return what `save_description` wrote, as rank 0 reads it; None where it is missing or, with a warning, damaged.

    Collective.
    """
    about: list = [None]
    if dist.get_rank() == 0 and (directory / DESCRIPTION).is_file():
        try:
            about = [read_description(directory)]
        except ValueError as error:
            logger.warning("load_checkpoint: %s; whether it fits this engine is not checked", error)
    dist.broadcast_object_list(about, 0)
    return about[0]


def problems(about: dict, engine) -> list[str]:
    """Why an engine cannot load a checkpoint of this description: nothing, or what it would trip over half-way."""
    relora = engine.relora
    saved, now = Storage(**about["frozen"]), engine.frozen.storage

    def layout(stage: int) -> str:  # stages 1 and 2 keep the same files
        return "1 or 2" if stage in (1, 2) else str(stage)

    pairs = [
        ("ZeRO stage", layout(about["stage"]), layout(engine.zero_optimization_stage())),
        ("bf16", about["bf16"], engine.bfloat16_enabled()),
    ]
    for name in ("r", "lora_alpha"):
        pairs.append((f"relora.{name}", (about["relora"] or {}).get(name), getattr(relora, name, None)))
    found = [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]
    if engine.frozen.layers and not (saved.with_masters or saved.exact) and not saved.same_bytes(now):
        found.append(
            f"relora.frozen_dtype was {saved}, is {now}, and without fp32 masters (frozen_master: none) what "
            "was rounded once would be rounded again; go on as it was begun"
        )
    return found


def read_model(directory: Path) -> SavedModel:
    """Read the checkpoint of one step (a DeepSpeed "tag"), of any ZeRO stage, precision and world size.

    It may be a universal one, with our files beside DeepSpeed's.

    Raises:
        ValueError: it is no checkpoint of ours, or incomplete; names the missing file or weights.
    """
    about = read_description(directory)
    shapes = {name: torch.Size(p["shape"]) for name, p in about["parameters"].items()}
    trains = {name for name, p in about["parameters"].items() if p["trains"]}
    stored = model_states(directory, about)
    trained = {
        name: value.view(shapes[name]).contiguous()
        for name, value in _masters(directory, about, stored[0])
        if name in trains
    }
    base = {f"{name}.weight": value for name, value in _base_weights(directory, about, stored, about["layers"]).items()}
    frozen = {name: _stored(name, about, stored) for name in shapes if name not in trains and name not in base}
    frozen |= {name: stored[0]["module"][name].detach() for name in about["buffers"] if name not in base} | base
    frozen = {name: value.float() if value.is_floating_point() else value for name, value in frozen.items()}
    if missing := sorted(trains - set(trained)):
        raise ValueError(
            f"{directory}: the masters of {len(missing)} parameters are missing (first: {missing[0]}); "
            "use another checkpoint"
        )
    return SavedModel(about["t"], about["restarts"], about["relora"], about["layers"], trained, frozen)


def read_base_weights(directory: Path, layers: Container[str]) -> dict[str, Tensor]:
    """The frozen weights of `layers`, fp32, by the layers' names; no others are read. Errors: see `read_model`."""
    about = read_description(directory)
    return _base_weights(directory, about, model_states(directory, about), layers)


def shapes_of(directory: Path) -> dict[str, torch.Size]:
    """The shapes of the plain model's tensors, see `plain_shapes`. Errors: see `read_model`."""
    about = read_description(directory)
    buffers = model_states(directory, about)[0]["module"] if about["buffers"] else {}
    return plain_shapes(about, {name: buffers[name].shape for name in about["buffers"]})


def plain_shapes(about: dict, buffers: dict[str, torch.Size]) -> dict[str, torch.Size]:
    """The shapes of a plain model's parameters and buffers, from a description of the model that was trained."""
    shapes = {name: torch.Size(p["shape"]) for name, p in about["parameters"].items() if not is_lora_parameter(name)}
    return {
        **shapes,
        **{f"{name}.weight": torch.Size(layer["shape"]) for name, layer in about["layers"].items()},
        **buffers,
    }


def model_states(directory: Path, about: dict) -> list[dict]:
    """The contents of DeepSpeed's files that are not the optimizer's: one, at stage 3 one of each rank."""
    ranks = range(about["world_size"])
    names = (
        [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in ranks]
        if about["stage"] == 3
        else ["mp_rank_00_model_states.pt"]
    )
    return [_load(directory, name) for name in names]


def universal_file(directory: Path, name: str, what: str) -> Path:
    """Where a universal checkpoint has a parameter's master (`fp32`) or moment."""
    return directory / UNIVERSAL / name / f"{what}.pt"


def universal_tensor(directory: Path, name: str, what: str) -> Tensor:
    """A parameter's master (`fp32`) or moment in a universal checkpoint, flat."""
    found = _load(directory, str(universal_file(directory, name, what).relative_to(directory)))
    return (found["param"] if isinstance(found, dict) else found).detach().reshape(-1)


def _load(directory: Path, name: str) -> dict | Tensor:
    if not (directory / name).is_file():
        raise ValueError(
            f"{directory}: {name} is missing, so a part of the weights is; copy the files of every rank "
            "into one directory, or use another checkpoint"
        )
    try:
        with torch.serialization.safe_globals(_SAFE):
            # mapped: Adam's moments, two thirds of a file, are never read
            return torch.load(directory / name, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (
            str(error).splitlines()[0]
            if isinstance(error, RuntimeError)
            else (
                "it is cut short, or holds objects of classes that are not loaded for safety's sake: client_state may "
                "hold tensors and plain Python values"
            )
        )
        raise ValueError(f"{directory}: {name} cannot be read ({reason}); use another checkpoint") from error


def _masters(directory: Path, about: dict, model_states: dict) -> Iterator[tuple[str, Tensor]]:
    """The fp32 masters of what trains, as 1-D tensors, by name."""
    if (directory / UNIVERSAL).is_dir():
        for name, parameter in about["parameters"].items():
            if parameter["trains"]:
                yield name, universal_tensor(directory, name, "fp32")
        return
    if about["stage"] == 0:
        optimizer = model_states["optimizer"]
        if "fp32_groups" in optimizer:  # 16 bit
            yield from _by_name(about["groups"], optimizer["fp32_groups"])
        elif "fp32_groups_flat" in optimizer:  # 16 bit, FusedAdam
            for names, flat in zip(about["groups"], optimizer["fp32_groups_flat"], strict=True):
                sizes = [_numel(about, name) for name in names]
                yield from zip(names, flat.detach().split(sizes), strict=True)
        else:
            for name, parameter in about["parameters"].items():
                if parameter["trains"]:
                    yield name, model_states["module"][name].flatten()
        return
    prefix = "bf16_" if about["bf16"] else ""
    shards = [
        _load(directory, f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        for rank in range(about["world_size"])
    ]
    yield from _from_partitions(about, shards) if about["stage"] == 3 else _from_fragments(shards)


def _by_name(groups: list[list[str]], tensors: list[list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for names, values in zip(groups, tensors, strict=True):
        yield from ((name, value.detach().flatten()) for name, value in zip(names, values, strict=True))


def _from_fragments(shards: list[dict]) -> Iterator[tuple[str, Tensor]]:
    """Stages 1 and 2: a rank's part of a group is one flat tensor, with a mapping from names to fragments of it."""
    pieces: dict[str, list[Tensor]] = {}
    for shard in shards:  # the ranks' parts follow each other in the flattened group
        for flat, mapping in zip(shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"], strict=True):
            for name, at in mapping.items():
                pieces.setdefault(name, []).append(flat.detach()[at.start : at.start + at.numel])
    return ((name, torch.cat(parts)) for name, parts in pieces.items())


def _from_partitions(about: dict, shards: list[dict]) -> Iterator[tuple[str, Tensor]]:
    """Stage 3: every rank has an equal piece of every parameter, one after the other; the last ones are padded."""
    for group, names in enumerate(about["groups"]):
        flats = [shard["fp32_flat_groups"][group].detach() for shard in shards]
        offset = 0
        for name in names:
            numel = _numel(about, name)
            length = -(-numel // len(shards))
            yield name, torch.cat([flat[offset : offset + length] for flat in flats])[:numel]
            offset += length
        assert offset == flats[0].numel(), "ZeRO-3's flat partitions are laid out otherwise"


def _numel(about: dict, name: str) -> int:
    return torch.Size(about["parameters"][name]["shape"]).numel()


def _stored(name: str, about: dict, states: list[dict]) -> Tensor:
    """The stored copy of what does not train."""
    if about["stage"] < 3:
        return states[0]["module"][name].detach()
    shape = torch.Size(about["parameters"][name]["shape"])
    return torch.cat([state["frozen_param_fragments"][name] for state in states])[: shape.numel()].view(shape)


def _base_weights(directory: Path, about: dict, states: list[dict], layers: Container[str]) -> dict[str, Tensor]:
    """The frozen weights of low-rank layers: their masters, else what their stored copies stand for."""
    storage = Storage(**about["frozen"])
    shapes = {
        name: torch.Size(layer["shape"]) for name, layer in about["layers"].items() if layer["base"] and name in layers
    }
    if not (storage.with_masters or storage.replicated):
        return {
            name: storage.dequantize(_stored(f"{name}.weight", about, states), shape) for name, shape in shapes.items()
        }
    found = {}
    for path in sorted(directory.glob(MASTERS_GLOB)):
        with safe_open(path, framework="pt") as file:
            for name in shapes:
                key = name if storage.with_masters else STORED + name
                if key in file.keys():  # noqa: SIM118 (not a dict)
                    found[name] = (
                        file.get_tensor(key)
                        if storage.with_masters
                        else storage.dequantize(file.get_tensor(key), shapes[name])
                    )
    if missing := [name for name in shapes if name not in found]:
        raise ValueError(
            f"{directory}: the fp32 masters of {len(missing)} frozen weights are missing (first: "
            f"{missing[0]}); a {MASTERS_GLOB} file was lost, use another checkpoint"
        )
    return found

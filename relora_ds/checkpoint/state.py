"""An engine's state, taken out and put back: written against the shard view, so it knows no ZeRO stage.

Each rank writes the ranges of the fp32 masters and Adam moments that it owns, under names; any number of ranks, at any
stage, reads the ranges that it needs.
"""

import dataclasses
import json
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from relora_ds.checkpoint.manifest import FROZEN, TRAINED, DamagedError, Manifest, UnreadableError
from relora_ds.lowrank.wrap import full_shape, lowrank_layers
from relora_ds.zero.engine_state import engine_state, restore_engine_state
from relora_ds.zero.frozen_master import Storage, assign_owners
from relora_ds.zero.frozen_state import OTHER, STORED, frozen_state, other_parameters, restore_frozen_state
from relora_ds.zero.pinned import HostCopies
from relora_ds.zero.plain_model import persistent_buffers
from relora_ds.zero.shards import MOMENTS

PARTS = ("master", *MOMENTS)
BUFFER = "buffer/"
# Of a model's configuration: what changes nothing that it computes.
_ELSEWHERE = ("dtype", "torch_dtype", "transformers_version", "use_cache", "architectures", "name_or_path")
RANGES = "ranges"  # key of a file's metadata: JSON, {parameter: [start, stop]}


@dataclass(frozen=True)
class Captured:
    """What this rank writes: tensors on the CPU that training does not change.

    Attributes:
        trained: `PART/NAME`, 1-D, fp32; on rank 0 also `buffer/NAME`.
        ranges: `{NAME: (start, stop)}` of `trained` in the flattened parameters.
        frozen: see `zero.frozen_state`; None where it is what was written before.
        engine, model: for the manifest.
    """

    trained: dict[str, Tensor]
    ranges: dict[str, tuple[int, int]]
    frozen: dict[str, Tensor] | None
    engine: dict
    model: dict

    def contents(self) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """The ranges and the frozen tensors' names: what the ranks together must have all of."""
        return self.ranges, list(self.frozen or ())

    def gaps(self, contents: list[tuple[dict[str, tuple[int, int]], list[str]]]) -> str | None:
        """What is in the `contents` of no rank; None where everything is."""
        frozen = {name.removeprefix(STORED) for _, names in contents for name in names}
        for name, about in self.model["parameters"].items():
            end = 0
            for start, stop in sorted(ranges[name] for ranges, _ in contents if name in ranges):
                end = max(end, stop) if start <= end else end
            if about["trains"] and end < torch.Size(about["shape"]).numel():
                return f"no rank has written all of {name}"
        for name, layer in self.model["layers"].items():
            if self.frozen is not None and layer["base"] and f"{name}.weight" not in frozen:
                return f"no rank has written {name}.weight"
        return None


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
    trained, ranges = {}, {}
    for shard in shards:
        if shard.start < shard.stop and peers[owners.get(shard.name, peers.index(rank))] == rank:
            ranges[shard.name] = (shard.start, shard.stop)
            trained |= {f"{part}/{shard.name}": getattr(shard, part) for part in PARTS}
    trained = (copies or HostCopies(pinned=engine.device.type == "cuda")).take(trained)
    if rank == 0:
        trained |= {
            BUFFER + name: buffer.to("cpu", copy=True) for name, buffer in persistent_buffers(engine.module).items()
        }
    return Captured(
        trained, ranges, frozen_state(engine) if with_frozen else None, engine_state(engine), _description(engine)
    )


def _description(engine) -> dict:
    layers = lowrank_layers(engine.module)
    return {
        "parameters": {
            name: {"shape": list(full_shape(p)), "trains": p.requires_grad}
            for name, p in engine.module.named_parameters()
        },
        "layers": {
            name: {"scaling": layer.scaling, "base": layer.weight is not None, "shape": list(layer.weight_shape)}
            for name, layer in layers.items()
        },
        "frozen": dataclasses.asdict(engine.frozen.storage),
        "config": _configuration(engine.module),
        "relora": None if engine.relora is None else dataclasses.asdict(engine.relora),
    }


def _configuration(module) -> dict:
    """What decides the function of a transformers model; two networks of the same shapes may differ in it."""
    if not hasattr(getattr(module, "config", None), "to_dict"):
        return {}
    found = json.loads(json.dumps(module.config.to_dict(), default=str))
    return {name: value for name, value in found.items() if name not in _ELSEWHERE and not name.startswith("_")}


def problems(manifest: Manifest, engine) -> list[str]:
    """Why an engine cannot go on from a checkpoint: its network is another one, or weights cannot be converted."""
    found, now = [], json.loads(json.dumps(_description(engine)))
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
            "what was rounded once would be rounded again; go on as it was begun"
        )
    return found


@torch.no_grad()
def restore(engine, directory: Path, manifest: Manifest) -> None:
    """Put a checkpoint into an engine that `problems` finds nothing wrong with. Collective.

    Raises:
        DamagedError: on every rank, where one of them does not see a file that it needs. Nothing has been changed then.
    """
    shards, storage = engine.shards, Storage(**manifest.model["frozen"])
    with ExitStack() as stack:
        try:
            saved = SavedTensors(directory, manifest, stack)
            lack = saved.lacks(engine)
        except (DamagedError, UnreadableError) as error:  # the other ranks wait for word
            lack = str(error)
        lacking = [lack] * dist.get_world_size()
        dist.all_gather_object(lacking, lacking[0])
        if any(lacking):
            raise DamagedError(next(filter(None, lacking)))
        if engine.frozen.layers or any(not p.requires_grad for p in engine.module.parameters()):
            restore_frozen_state(engine, saved.read, storage)
        shards.drop_gathered_copies()
        for shard in shards:
            for part in PARTS:
                getattr(shard, part).copy_(saved.read_range(part, shard.name, shard.start, shard.stop))
        for name, buffer in persistent_buffers(engine.module).items():
            value = saved.read(BUFFER + name).to(buffer.device) if dist.get_rank() == 0 else torch.empty_like(buffer)
            dist.broadcast(value.contiguous().reshape(-1).view(torch.uint8), 0)
            buffer.copy_(value)
    for name in shards.names:  # what forward reads, from masters that are all in place now
        shards.write(name, shards.gather([name])[name])
    restore_engine_state(engine, manifest.engine)


class SavedTensors:
    """The tensors in the files of a checkpoint, as far as this host sees them; opened, not read.

    Args:
        stack: closes the files.
    """

    def __init__(self, directory: Path, manifest: Manifest, stack: ExitStack):
        self._directory, self._manifest = directory, manifest
        self._files: dict[str, safe_open] = {}  # by the name of a whole tensor
        self._ranges: dict[str, list[tuple[int, int, safe_open]]] = defaultdict(list)
        for name in sorted(manifest.files):
            path = directory / name
            if path.suffix != ".safetensors" or not path.is_file():
                continue
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise DamagedError(f"{path} is no safetensors file ({error})") from error
            except OSError as error:
                raise UnreadableError(f"{path} cannot be read now: {error.strerror or error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
            for parameter, (start, stop) in json.loads((file.metadata() or {}).get(RANGES, "{}")).items():
                self._ranges[parameter].append((start, stop, file))

    def names(self, prefix: str = "") -> list[str]:
        """Of the whole tensors."""
        return [name for name in self._files if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        if name not in self._files:
            raise DamagedError(self._reason(name, FROZEN))
        return self._files[name].get_tensor(name)

    def read_range(self, part: str, parameter: str, start: int, stop: int) -> Tensor:
        """`[start, stop)` of a flattened parameter's master or moment, fp32, put together from all who wrote of it."""
        value = torch.empty(stop - start)
        if self._num_found(parameter, start, stop) < stop - start:
            raise DamagedError(self._reason(f"{part} of {parameter}", TRAINED))
        for low, high, first, file in self._pieces(parameter, start, stop):
            value[low - start : high - start] = file.get_slice(f"{part}/{parameter}")[low - first : high - first]
        return value

    def lacks(self, engine) -> str | None:
        """What this rank's part of an engine needs and this host does not see; None where it sees everything."""
        for shard in engine.shards:
            if self._num_found(shard.name, shard.start, shard.stop) < shard.stop - shard.start:
                return self._reason(shard.name, TRAINED)
        for name in engine.frozen.owned():
            if not {f"{name}.weight", f"{STORED}{name}.weight"} & self._files.keys():
                return self._reason(f"{name}.weight", FROZEN)
        if dist.get_rank() == 0:
            others = [OTHER + name for name, _ in other_parameters(engine)]
            buffers = [BUFFER + name for name in persistent_buffers(engine.module)]
            for name in (*others, *buffers):
                if name not in self._files:
                    return self._reason(name, FROZEN if name in others else TRAINED)
        return None

    def _pieces(self, parameter: str, start: int, stop: int) -> list[tuple]:
        pieces = [(max(start, first), min(stop, last), first, file) for first, last, file in self._ranges[parameter]]
        return [piece for piece in pieces if piece[0] < piece[1]]

    def _num_found(self, parameter: str, start: int, stop: int) -> int:
        return sum(high - low for low, high, *_ in self._pieces(parameter, start, stop))

    def _reason(self, what: str, kind: str) -> str:
        unseen = [
            f"{name} (of host {file.host})"
            for name, file in self._manifest.files.items()
            if name.startswith(kind) and not (self._directory / name).is_file()
        ]
        reason = f"this host does not see {', '.join(unseen[:4])}" if unseen else "no file has it"
        return (
            f"{self._directory}: {what} is missing: {reason}; run_dir should be on a file system that all hosts "
            "share, else the same hosts with the same number of ranks go on"
        )

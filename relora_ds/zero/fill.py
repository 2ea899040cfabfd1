"""Fill an engine that was built on a model without values, one tensor after the other.

A tensor is read by one rank, all ranks reading at the same time, and sent from there in pieces. Of a piece each
rank keeps what it stores: its part of the fp32 master, and of what forward reads. A frozen weight is read by its owner,
which keeps the master and sends the stored copy only.
"""

from collections.abc import Callable, Iterator
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.zero.frozen_master import FrozenWeights, is_partitioned
from relora_ds.zero.partitions import write_partition
from relora_ds.zero.plain_model import persistent_buffers
from relora_ds.zero.shards import PIECE, ShardView
from relora_ds.zero.subspaces import write_initial_A
from relora_ds.zero.together import together
from relora_ds.zero.weights import (
    OwnedWeights,
    PartitionedWeights,
    PlainTensor,
    WeightSource,
    plain_tensors,
    readers_of,
)

Place = Callable[[Tensor, int], object]  # takes a piece, and the element of the flattened tensor at which it begins


@torch.no_grad()
def fill(
    module: nn.Module,
    shards: ShardView,
    frozen: FrozenWeights,
    sources: list[WeightSource | PartitionedWeights],
    device: torch.device,
) -> None:
    """Give an engine's parameters and buffers the values of `sources`. Collective.

    Buffers that no source has get rank 0's values, low-rank factors those that they begin with.

    Raises:
        ValueError: on every rank, where a tensor could not be read.
    """
    engine = _Unfilled(module, shards, frozen, device)
    for source in sources:
        tensors = [tensor for tensor in engine.tensors if source.shapes.keys() & set(tensor.names)]
        if isinstance(source, PartitionedWeights):
            engine.gather(source, tensors)
        else:
            engine.read(source, tensors)
    engine.set_initial_factors()
    engine.align_buffers({name for source in sources for name in source.shapes})


class _Unfilled:
    """An engine's parts, and how values get into them."""

    def __init__(self, module: nn.Module, shards: ShardView, frozen: FrozenWeights, device: torch.device):
        self.module, self.shards, self.frozen, self.device = module, shards, frozen, device
        self.tensors = plain_tensors(module)
        self._parameters, self._buffers = dict(module.named_parameters()), persistent_buffers(module)
        self._layers = {layer.plain_name(name): name for name, layer in frozen.layers.items()}
        self._bases = {f"{name}.lora_A": name for name in frozen.one_sided}

    def read(self, source: WeightSource, tensors: list[PlainTensor]) -> None:
        """Take `tensors` from a source of whole tensors."""
        readers = _readers(source, tensors, self.module)
        for together_read in _rounds(tensors, readers):
            values: dict[str, Tensor] = {}
            mine = next((t for t in together_read if readers[t.name] == dist.get_rank()), None)
            together("weights", lambda: values.update(_read(source, mine)), ValueError)  # noqa: B023 (called at once)
            for tensor in together_read:
                self._take(tensor, values.pop(tensor.name, None), readers[tensor.name])

    def gather(self, source: PartitionedWeights, tensors: list[PlainTensor]) -> None:
        """Take `tensors` from the partitions of a model."""
        for tensor in tensors:
            place = self._place(tensor)
            for start, stop in _ranges(tensor.shape):
                place(source.piece(tensor.name, start, stop, self.device), start)
            source.forget(tensor.name)

    def set_initial_factors(self) -> None:
        """Give the factors that have no values yet those that they begin with; nothing is sent."""
        for name, layer in lowrank_layers(self.module).items():
            if (seed := layer.initial_seed) is None:
                continue
            write_initial_A(self.shards, self.frozen, name, layer, seed=seed, number=0)
            self.shards.write(f"{name}.lora_B", layer.initial_B(name, seed=seed))
            layer.initial_seed = None

    def align_buffers(self, filled: set[str]) -> None:
        """Give every rank rank 0's values of the buffers that are not filled."""
        for name, buffer in self.module.named_buffers():
            if name not in (*filled, *self._layers, *self._bases) and buffer.numel():
                _sent(buffer.clone(), 0, buffer)

    def _take(self, tensor: PlainTensor, value: Tensor | None, reader: int) -> None:
        """Store a tensor, of which rank `reader` has the value."""
        layer = self._layers.get(tensor.name)
        if layer is not None and self.frozen.owners[layer] == reader:
            self.frozen.take(layer, value)
            return
        place = self._place(tensor)
        for piece, start in _pieces(value, reader, tensor.shape, self._dtype(tensor), self.device):
            place(piece, start)

    def _place(self, tensor: PlainTensor) -> Place:
        """Return what stores the pieces of a tensor, which every rank has."""
        if (layer := self._layers.get(tensor.name)) is not None:
            mine = self.frozen.owners[layer] == dist.get_rank()
            return _Assembled(
                tensor.shape,
                torch.float32,
                self.device if mine else torch.device("meta"),
                lambda value: self.frozen.take(layer, value if mine else None),
            )
        if (one_sided := self._bases.get(tensor.name)) is not None:
            mine = self.frozen.owners[one_sided] == dist.get_rank()
            return _Assembled(
                tensor.shape,
                torch.float32,
                self.device,
                lambda value: self.frozen.publish_A(one_sided, value if mine else None),
            )
        if tensor.name in self._buffers:
            buffer = self._buffers[tensor.name]
            return _Assembled(tensor.shape, buffer.dtype, buffer.device, buffer.copy_)
        parameter = self._parameters[tensor.name]
        if parameter.requires_grad:
            return lambda piece, start: self.shards.write(tensor.name, piece, start)
        if is_partitioned(parameter):
            return lambda piece, start: write_partition(parameter, piece, start)
        return lambda piece, start: parameter.data.view(-1)[start : start + piece.numel()].copy_(piece)

    def _dtype(self, tensor: PlainTensor) -> torch.dtype:
        """Return the dtype in which a tensor is sent."""
        if tensor.name in self._layers or tensor.name in self._bases:
            return torch.float32
        like = self._buffers[tensor.name] if tensor.name in self._buffers else self._parameters[tensor.name]
        return torch.float32 if like.is_floating_point() else like.dtype


class _Assembled:
    """Puts the pieces of a tensor together, and hands it on when it is whole."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, done: Callable[[Tensor], object]):
        self._whole, self._done = torch.empty(shape, dtype=dtype, device=device), done

    def __call__(self, piece: Tensor, start: int) -> None:
        flat, stop = self._whole.view(-1), start + piece.numel()
        flat[start:stop].copy_(piece)
        if stop == flat.numel():
            self._done(self._whole)


@torch.no_grad()
def fill_moments(shards: ShardView, what: str, source: OwnedWeights, device: torch.device) -> None:
    """Give the Adam moments `what` the values of `source`. Collective."""
    for name, shape in source.shapes.items():
        reader = source.owners[name]
        value = source.read(name) if reader == dist.get_rank() else None
        shard = shards[name]
        for piece, start in _pieces(value, reader, shape, torch.float32, device):
            shard.write(what, piece, start)


def _readers(source: WeightSource, tensors: list[PlainTensor], module: nn.Module) -> dict[str, int]:
    """Return the rank that reads each tensor, by its first name."""
    usual, owners = readers_of(module), source.owners or {}
    return {t.name: next((owners[name] for name in t.names if name in owners), usual[t.name]) for t in tensors}


def _rounds(tensors: list[PlainTensor], readers: dict[str, int]) -> Iterator[list[PlainTensor]]:
    """Yield lists of tensors of which no rank reads more than one."""
    queues = [[t for t in tensors if readers[t.name] == rank] for rank in range(dist.get_world_size())]
    for column in zip_longest(*queues):
        yield [tensor for tensor in column if tensor is not None]


def _read(source: WeightSource, tensor: PlainTensor | None) -> dict[str, Tensor]:
    """Return a tensor from its source; nothing where there is none to read."""
    if tensor is None:
        return {}
    first, *others = [name for name in tensor.names if name in source.shapes]
    try:
        value = _on_cpu(source.read(first))
        differ = [other for other in others if not torch.equal(_on_cpu(source.read(other)), value)]
    except Exception as error:  # whatever a source raises
        raise ValueError(f"{first} cannot be read ({type(error).__name__}: {error})") from error
    if value.shape != tensor.shape:
        raise ValueError(f"{first} is {tuple(value.shape)} instead of {tuple(tensor.shape)} when it is read")
    if differ:
        raise ValueError(
            f"{first} and {differ[0]} differ, but share one tensor in this model; set tie_word_embeddings "
            "to false in its configuration"
        )
    return {tensor.name: value}


def _on_cpu(value: Tensor) -> Tensor:
    """Return what a source gave; raise here, not between the ranks' collectives, if that is no tensor with values."""
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)


def _pieces(
    value: Tensor | None, sender: int, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, int]]:
    """Yield rank `sender`'s tensor on every rank: 1-D pieces, and the element at which each begins. Collective."""
    flat = None if value is None else value.reshape(-1)
    for start, stop in _ranges(shape):
        yield (
            _sent(
                None if flat is None else flat[start:stop],
                sender,
                torch.empty(stop - start, dtype=dtype, device=device),
            ),
            start,
        )


def _ranges(shape: torch.Size) -> Iterator[tuple[int, int]]:
    for start in range(0, shape.numel(), PIECE):
        yield start, min(start + PIECE, shape.numel())


def _sent(value: Tensor | None, sender: int, into: Tensor) -> Tensor:
    """Fill `into`, which is contiguous, with rank `sender`'s value. Collective."""
    if dist.get_rank() == sender:
        assert value is not None
        into.copy_(value)
    dist.broadcast(into.view(-1).view(torch.uint8), sender)  # bytes: not every backend knows every dtype
    return into

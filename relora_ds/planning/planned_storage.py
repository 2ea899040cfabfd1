"""How an engine will store the frozen weights of a network: what its memory and its traffic follow from."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.base_format import Format
from relora_ds.lowrank.formats import DENSE, DTYPES
from relora_ds.lowrank.fp8 import multiplies_fp8
from relora_ds.lowrank.storage import format_at, has_masters, is_sharded
from relora_ds.planning.network import Shapes

ELEMENT_SIZE = {precision: dtype.itemsize for precision, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A frozen tensor.

    Attributes:
        numel: its elements as ZeRO counts them: bytes, where it is packed.
        element_size: bytes of one.
        sharded: whether ZeRO-3 shards and gathers it.
    """

    numel: int
    element_size: int
    sharded: bool

    @property
    def num_bytes(self) -> int:
        return self.numel * self.element_size


@dataclass(frozen=True)
class PlannedStorage:
    """How frozen tensors are stored.

    Attributes:
        merged: weights, by layer.
        frozen: those of no layer.
        with_masters: whether `merged` has fp32 masters.
        bases: the A's that are frozen, by layer.
    """

    merged: dict[str, Stored]
    frozen: tuple[Stored, ...]
    with_masters: bool
    bases: dict[str, Stored] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Stored, ...]:
        return *self.merged.values(), *self.bases.values(), *self.frozen

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them, whole."""
        return sum(stored.num_bytes for stored in self.all)

    @property
    def sharded_bytes(self) -> int:
        """Bytes of those that ZeRO-3 shards, whole."""
        return sum(stored.num_bytes for stored in self.all if stored.sharded)


def storage_of(shapes: Shapes, relora: ReLoRAConfig | None, *, precision: str, stage: int) -> PlannedStorage:
    """Return how the frozen weights of `shapes` are stored. relora: the method's; None without low-rank layers."""
    frozen = tuple(Stored(size, ELEMENT_SIZE[precision], stage == 3) for size in shapes.frozen)
    if relora is None:
        return PlannedStorage({}, frozen, with_masters=False)
    format, sharded = format_here(relora, precision, stage), is_sharded(relora, stage)

    def stored(shape: torch.Size) -> Stored:
        like = format.stored_like(shape, DTYPES[precision], "meta")
        return Stored(like.numel(), like.element_size(), sharded)

    return PlannedStorage(
        {name: stored(shape) for name, shape in shapes.merged.items()},
        frozen,
        with_masters=has_masters(relora, precision),
        bases={name: Stored(size, ELEMENT_SIZE[precision], sharded) for name, size in shapes.bases.items()},
    )


def format_here(relora: ReLoRAConfig | None, precision: str, stage: int) -> Format:
    """Return the format of the frozen weights at a ZeRO stage, on devices such as this machine's."""
    if relora is None:
        return DENSE
    return format_at(relora, precision, stage, in_fp8=_this_machine_multiplies_fp8())


def _this_machine_multiplies_fp8() -> bool:
    return torch.cuda.is_available() and multiplies_fp8(torch.device("cuda"))


@dataclass(frozen=True)
class Gathered:
    """What ZeRO-3 shards, by size.

    Attributes:
        elements, num_bytes: of what is gathered to be used.
        small_bytes: of what is kept whole, and is gathered after an update only.
        repeated_bytes: of what is gathered a second time where activations are checkpointed.
    """

    elements: int
    num_bytes: int
    small_bytes: int
    repeated_bytes: int


def gathered_by_stage_3(shapes: Shapes, storage: PlannedStorage, zero: dict, element_size: int) -> Gathered:
    """zero: a resolved `zero_optimization` section. element_size: bytes of an element that trains."""

    def sizes(trainable: Iterable[int], frozen: Iterable[Stored]) -> list[tuple[int, int]]:
        return [(size, element_size) for size in trainable] + [(s.numel, s.element_size) for s in frozen if s.sharded]

    def is_large(size: tuple[int, int]) -> bool:
        return size[0] > zero["stage3_param_persistence_threshold"]

    everything = sizes((size for group in shapes.groups for size in group), storage.all)
    large = list(filter(is_large, everything))
    of_layers = [
        stored[name] for stored in (storage.merged, storage.bases) for name in shapes.repeated_merged if name in stored
    ]
    repeated = filter(is_large, sizes(shapes.repeated, of_layers))
    num_bytes = _bytes(large)
    return Gathered(sum(numel for numel, _ in large), num_bytes, _bytes(everything) - num_bytes, _bytes(repeated))


def _bytes(sizes: Iterable[tuple[int, int]]) -> int:
    return sum(numel * element_size for numel, element_size in sizes)

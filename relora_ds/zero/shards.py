"""One view of "my shard of this parameter", the same for every ZeRO stage.

DeepSpeed keeps the fp32 masters and the Adam moments of a trainable parameter in a different place for
every optimizer wrapper. Restart, checkpoint and every method are written against the view below and
never ask for the stage:

    for shard in ShardView(engine):
        shard.start, shard.stop      # the range of parameter.flatten() that this rank owns; may be empty
        shard.master                 # fp32, writable, [stop - start]
        shard.exp_avg, shard.exp_avg_sq   # Adam's moments: read(), write(values), keep(mask)
    view.write(name, value)          # a value that every rank holds -> master *and* the copy forward reads
    view.gather(names)               # the full fp32 masters, on every rank or on one
    view.collect(name, what, dst)    # one full tensor on one rank, sent in pieces

There is one small adapter per DeepSpeed wrapper; a wrapper that none of them knows is an error. Nothing
is cached: DeepSpeed replaces its tensors when it loads a checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from relora_ds.zero.adam_state import MOMENTS, DenseMoment, Moment, adam_state
from relora_ds.zero.partitions import copy_common, partition_range, write_partition

PIECE = 1 << 20  # elements that are sent at a time where no rank but one needs the whole tensor


@dataclass(frozen=True)
class Location:
    """Where this rank's piece of a parameter is: `p.flatten()[start:stop]` is `flat[offset:offset + stop - start]`."""

    start: int
    stop: int
    flat: Tensor | None  # the tensor that the inner optimizer steps; None where this rank owns nothing
    offset: int = 0


@dataclass(frozen=True)
class Shard:
    """This rank's piece of one trainable parameter, `stop - start` elements of it; `master` is a 1-D writable view."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    start: int
    stop: int
    master: Tensor
    exp_avg: Moment
    exp_avg_sq: Moment

    @property
    def numel(self) -> int:
        """Elements of the whole parameter, over all ranks."""
        return self.shape.numel()

    def slice(self, value: Tensor) -> Tensor:
        """Return this rank's piece of a full-size tensor, 1-D."""
        return value.reshape(-1)[self.start : self.stop]

    def read(self, what: str) -> Tensor:
        """Return "master", "exp_avg" or "exp_avg_sq" in fp32, 1-D, not to be written to."""
        return self.master if what == "master" else self.moment(what).read()

    def write(self, what: str, piece: Tensor, start: int) -> None:
        """Set what this rank has of a 1-D piece of the tensor, which begins at element `start`. what: as in `read`."""
        if what == "master":
            copy_common(self.master, self.start, piece, start)
            return
        first, stop = max(self.start, start), min(self.stop, start + piece.numel())
        if first < stop:
            self.moment(what).write(piece[first - start : stop - start], first - self.start)

    def moment(self, what: str) -> Moment:
        """Return "exp_avg" or "exp_avg_sq"."""
        assert what in MOMENTS
        return getattr(self, what)


class _Adapter:
    """What is common: the low-precision copy is a whole tensor on every rank, the masters may be split."""

    partitioned = True

    def __init__(self, wrapper):
        self.wrapper = wrapper

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The Adam that DeepSpeed wraps."""
        return self.wrapper.optimizer

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def locate(self, parameter: nn.Parameter) -> Location:
        raise NotImplementedError

    def flats(self) -> list[tuple[int, Tensor]]:
        """Every tensor that the inner optimizer steps, with the index of its parameter group."""
        return [(i, p) for i, group in enumerate(self.inner.param_groups) for p in group["params"]]

    def write_forward_copy(self, parameter: nn.Parameter, piece: Tensor, start: int) -> None:
        parameter.data.view(-1)[start : start + piece.numel()].copy_(piece)

    def forward_copy(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """Return what forward reads on this rank, 1-D, and its start in the flattened parameter."""
        return parameter.data.reshape(-1), 0

    def drop_gathered_copies(self) -> None:
        """Make sure that the next forward sees what is written now."""


class _Unwrapped(_Adapter):
    """Stage 0 in fp32: the optimizer steps the parameters themselves."""

    partitioned = False

    @property
    def inner(self):
        return self.wrapper

    def locate(self, parameter):
        return Location(0, parameter.numel(), parameter)


class _Unfused(_Adapter):
    """Stage 0 in 16 bit with any optimizer but DeepSpeed's FusedAdam: one fp32 master per parameter."""

    partitioned = False

    def locate(self, parameter):
        for stored, masters in zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True):
            for candidate, master in zip(stored, masters, strict=True):
                if candidate is parameter:
                    return Location(0, parameter.numel(), master)
        raise KeyError("the optimizer does not hold this parameter")


class _Fused(_Adapter):
    """Stage 0 in 16 bit with FusedAdam: one flat fp32 master per group, parameters one after the other."""

    partitioned = False

    def locate(self, parameter):
        for stored, flat in zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups_flat, strict=True):
            offset = 0
            for candidate in stored:
                if candidate is parameter:
                    return Location(0, parameter.numel(), flat, offset)
                offset += candidate.numel()
        raise KeyError("the optimizer does not hold this parameter")


class _Linked(_Adapter):
    """Stages 1 and 2: DeepSpeed links each parameter to its fragment of this rank's flat partition."""

    def partition(self, group: int) -> Tensor:
        return self.wrapper.single_partition_of_fp32_groups[group]

    def locate(self, parameter):
        fragment = parameter._hp_mapping
        if fragment is None:
            return Location(0, 0, None)
        lp, hp = fragment.lp_fragment_address, fragment.hp_fragment_address
        assert lp.numel == hp.numel
        return Location(lp.start, lp.start + lp.numel, self.partition(fragment.param_group_index), hp.start)


class _LinkedBF16(_Linked):
    """Stage 1 in bf16 with fp32 gradient accumulation (BF16_Optimizer)."""

    def partition(self, group):
        return self.wrapper.fp32_groups_flat_partition[group]


class _Stage3(_Adapter):
    """Stage 3: every rank owns an equal piece of every parameter, the last ones padded."""

    def shape(self, parameter):
        return parameter.ds_shape

    def locate(self, parameter):
        group, offset, length = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
        start, stop = partition_range(parameter)
        assert stop - start <= length
        return Location(start, stop, self.wrapper.fp32_partitioned_groups_flat[group], offset)

    def flats(self):
        # Between steps DeepSpeed keeps the inner optimizer's groups empty.
        return [
            (self.wrapper.sub_group_to_group_id[i], flat)
            for i, flat in enumerate(self.wrapper.fp32_partitioned_groups_flat)
        ]

    def write_forward_copy(self, parameter, piece, start):
        write_partition(parameter, piece, start)

    def forward_copy(self, parameter):
        start, stop = partition_range(parameter)
        return parameter.ds_tensor.data[: stop - start], start

    def drop_gathered_copies(self):
        # After an evaluation, parameters are still gathered and an edited partition would go unseen.
        self.wrapper.empty_partition_cache()


_ADAPTERS = {
    FP16_UnfusedOptimizer: _Unfused,
    FP16_Optimizer: _Fused,
    DeepSpeedZeroOptimizer: _Linked,
    BF16_Optimizer: _LinkedBF16,
    DeepSpeedZeroOptimizer_Stage3: _Stage3,
}


def _adapter(engine: DeepSpeedEngine) -> _Adapter:
    kind = type(engine.optimizer)
    if kind in _ADAPTERS:
        return _ADAPTERS[kind](engine.optimizer)
    if issubclass(kind, torch.optim.Optimizer):
        return _Unwrapped(engine.optimizer)
    raise TypeError(
        f"relora_ds does not know how {kind.__name__} keeps its shards; "
        "supported: DeepSpeed 0.19 with Adam or AdamW at ZeRO stages 0 to 3"
    )


class ShardView:
    """The trainable parameters of a DeepSpeed engine, each as this rank's `Shard`, by name and in model order.

    group_of: the index of each one's parameter group, by name; groups may have no names, and DeepSpeed empties them.
    """

    def __init__(self, engine: DeepSpeedEngine, group_of: dict[str, int]):
        self._adapter = _adapter(engine)
        self._device = engine.device
        self._group_of = group_of
        self._state = adam_state(self._adapter.inner)
        self._parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}

    @property
    def names(self) -> list[str]:
        """The trainable parameters' names, the same list on every rank."""
        return list(self._parameters)

    @property
    def partitioned(self) -> bool:
        """False where every rank holds every master whole (stage 0, or one rank)."""
        return self._adapter.partitioned and dist.get_world_size() > 1

    def __iter__(self) -> Iterator[Shard]:
        return (self[name] for name in self._parameters)

    def __getitem__(self, name: str) -> Shard:
        parameter = self._parameters[name]
        at = self._adapter.locate(parameter)
        if at.flat is None or at.start == at.stop:
            master = torch.empty(0, device=self._device)
            moments: list[Moment] = [DenseMoment(master)] * 2
        else:
            first, last = at.offset, at.offset + at.stop - at.start
            master = at.flat.data.detach().view(-1)[first:last]
            moments = [self._state.moment(at.flat, what, first, last) for what in MOMENTS]
        return Shard(name, parameter, self._adapter.shape(parameter), at.start, at.stop, master, *moments)

    @torch.no_grad()
    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        """Set a parameter to `value`, which every rank holds: master and model weights, together.

        Writing only one of them is the classic mistake: the master alone leaves one step on the old
        value, the copy alone is undone by the next step. Collective in effect, but nothing is sent.

        Args:
            value: a full-size tensor, or the elements of it from `start` on.
        """
        shard = self[name]
        piece = value.reshape(-1).to(shard.parameter.device if not shard.master.numel() else shard.master.device)
        copy_common(shard.master, shard.start, piece, start)
        self._adapter.write_forward_copy(shard.parameter, piece, start)

    def forward_copy(self, name: str) -> tuple[Tensor, int]:
        """Return this rank's piece of what forward reads, 1-D, and its start in the flattened parameter."""
        return self._adapter.forward_copy(self._parameters[name])

    def numbered(
        self, number: Callable[[str, Tensor], Tensor], names: Iterable[str]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor that the optimizer steps on this rank and that has elements of some parameters.

        Beside it comes an int32 tensor of its length: `number(name, indices)` at the places of these elements, of which
        `indices` are those in the flattened parameter; 0 elsewhere.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for name in names:
            at = self._adapter.locate(self._parameters[name])
            if at.flat is None or at.start == at.stop:
                continue
            flat, numbers = found.setdefault(
                id(at.flat), (at.flat, torch.zeros(at.flat.numel(), dtype=torch.int32, device=at.flat.device))
            )
            indices = torch.arange(at.start, at.stop, device=flat.device)
            numbers[at.offset : at.offset + at.stop - at.start] = number(name, indices).to(torch.int32)
        yield from found.values()

    def drop_gathered_copies(self) -> None:
        """Call before writing: ZeRO-3 may still hold whole parameters from the last forward."""
        self._adapter.drop_gathered_copies()

    @torch.no_grad()
    def gather(self, names: Iterable[str], what: str = "master", dst: int | None = None) -> dict[str, Tensor]:
        """Full fp32 tensors, in their shapes, put together from all shards. Collective: all ranks, same names.

        Args:
            what: "master", "exp_avg" or "exp_avg_sq".
            dst: the one rank that gets them (the others get an empty dict); None for every rank.
        """
        shards = [self[name] for name in names]
        buffer = torch.zeros(sum(s.numel for s in shards), dtype=torch.float32, device=self._device)
        pieces = buffer.split([s.numel for s in shards]) if shards else []
        for shard, piece in zip(shards, pieces, strict=True):
            piece[shard.start : shard.stop].copy_(shard.read(what))
        if self.partitioned and shards:
            # Every element is non-zero on one rank at most, so a sum is exact.
            if dst is None:
                dist.all_reduce(buffer)
            else:
                dist.reduce(buffer, dst)
        if dst is not None and dist.get_rank() != dst:
            return {}
        return {s.name: piece.view(s.shape) for s, piece in zip(shards, pieces, strict=True)}

    @torch.no_grad()
    def collect(self, name: str, what: str, dst: int) -> Tensor | None:
        """One full fp32 tensor in its shape, on the CPU of rank `dst`; None elsewhere. Collective.

        It is sent in pieces, so that no other rank ever holds it whole. what: as in `gather`.
        """
        shard = self[name]
        mine = shard.read(what)
        whole = torch.empty(shard.numel) if dist.get_rank() == dst else None
        for start in range(0, shard.numel, PIECE):
            piece = torch.zeros(min(PIECE, shard.numel - start), device=self._device)
            copy_common(piece, start, mine, shard.start)
            if self.partitioned:
                dist.reduce(piece, dst)
            if whole is not None:
                whole[start : start + piece.numel()].copy_(piece)
        return None if whole is None else whole.view(shard.shape)

    def create_adam_state(self) -> None:
        """Give the inner Adam zero moments and step 0 before its first step, so that the view is whole at once.

        Also undoes the step that DeepSpeed's 16-bit wrappers take at construction to allocate the state.
        """
        for group, flat in self._adapter.flats():
            self._state.create(flat, group)

    def zero_moments(self) -> None:
        """Set all moments to 0. Before others are written: in 8 bit, old ones in a block cost new ones precision."""
        for _, flat in self._adapter.flats():
            self._state.zero(flat)

    def adam_steps(self) -> dict[str, int]:
        """Adam's step count by parameter-group name ("lora", "lora_A", "matrices", "vectors"), else by index."""
        groups = self._adapter.inner.param_groups
        return {groups[i].get("name", str(i)): self._state.step(flat) for i, flat in self._adapter.flats()}

    def adam_of(self, name: str) -> tuple[int, tuple[float, float]]:
        """Return Adam's step count and betas of a parameter, also on ranks that have no piece of it."""
        group = self._group_of[name]
        step = next(self._state.step(flat) for i, flat in self._adapter.flats() if i == group)
        return step, self._adapter.inner.param_groups[group]["betas"]

    def set_adam_steps(self, steps: dict[str, int]) -> None:
        """Set Adam's step count of the parameter groups with these names."""
        groups = self._adapter.inner.param_groups
        for i, flat in self._adapter.flats():
            if (name := groups[i].get("name", str(i))) in steps:
                self._state.set_step(flat, steps[name])

    def begin_adam(self, names: Iterable[str]) -> None:
        """Set Adam's step count to 0 for parameters whose moments are 0.

        One count is that of a whole group, so groups that hold others as well keep theirs.
        """
        begun = set(names)
        shared = {group for name, group in self._group_of.items() if name not in begun}
        for i, flat in self._adapter.flats():
            if i not in shared:
                self._state.set_step(flat, 0)

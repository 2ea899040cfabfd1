"""One island's side of the exchanges, on every rank of its engine.

Islands train by themselves. At an exchange they make one model again of what each of them has added to its weights
since the last one, its update:

    merged weights      (ρ - 1)·W + s·B·A, of which the factors are sent. Averaged are the products: the product of
                        averaged factors is another matrix
    everything else     what the masters have moved away from the anchor, their value after the last exchange
    that trains

Both are made small by `exchange.compress`.

Every weight has one owner rank in each island, which sends, receives and computes for it: the mean over the islands in
the server's decision, weighted by what they have trained on and summed in the order of their names, so that all islands
hold the same bits afterwards; then the outer optimizer. An island that has missed exchanges makes them good from what
the server keeps (`catch_up`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.exchange import compress
from relora_ds.exchange.arrivals import Arrived, decision_of, linked, updates_of
from relora_ds.exchange.outer import Outer
from relora_ds.exchange.report import ExchangeReport
from relora_ds.lowrank.reinit import sketch_shape
from relora_ds.lowrank.wrap import is_lora_parameter
from relora_ds.zero.adam_state import MOMENTS
from relora_ds.zero.frozen_master import assign_owners
from relora_ds.zero.shards import PIECE
from relora_ds.zero.verify_ranks import checksum

if TYPE_CHECKING:
    from relora_ds.exchange.island import Islands
    from relora_ds.islands.client import Link

_SKETCH = "sketch/"  # before a layer's name
_ANCHOR, _MOMENTUM, _ERROR = "anchor/", "momentum/", "error/"

Factors = Iterable[tuple[str, Tensor, Tensor]]  # layer, A, B


class Exchange:
    """The exchanges of an engine. Collective: all ranks of the island make every call.

    Args:
        engine: a `ReLoRAEngine`.
        link: to the server; this rank's.
        islands: the membership that all engines of a run share.
        every: steps between the exchanges of an engine without restarts. One with restarts exchanges at each of them.
        compression: of everything but factors.
        factor_compression: of factors.
        resets_moments: whether Adam's moments of all that is no factor begin anew.

    Attributes:
        island: name of this one.
        round: exchanges so far.
        t: the engine's step at the newest.
        reports: of the exchanges since `take_reports`.
        takes_place: whether one takes place now.
        origin: what the islands began with, as a hash.
    """

    def __init__(
        self,
        engine,
        link: "Link",
        outer: Outer,
        islands: "Islands",
        *,
        every: int | None,
        compression: str,
        factor_compression: str,
        resets_moments: bool,
    ):
        self.round, self.t = 0, 0
        self.reports: list[ExchangeReport] = []
        self.takes_place, self.origin = False, ""
        self.engine, self.island, self._islands = engine, islands.name, islands
        self._link, self._outer, self._has_begun = link, outer, False
        self._every, self._resets_moments = every, resets_moments
        self._compression, self._factor_compression = compression, factor_compression
        self._replays, self._waited = False, 0.0
        self._who: tuple[tuple[str, ...], tuple[str, ...]] = (), ()
        shards = engine.shards
        sizes = {name: shards[name].numel for name in shards.names if not is_lora_parameter(name)}
        self._owners = assign_owners(sizes, dist.get_world_size())
        self._arrived: list[Arrived] = []
        self._anchors = dict(self._masters())
        self._errors: dict[str, Tensor] = {}

    # -- when ---------------------------------------------------------------------------------------------------

    def next_step(self, t: int) -> int:
        """Return the first step after `t` with an exchange: every so many steps, and at the end."""
        scheduler = self.engine.lr_scheduler
        every = scheduler.config.restart_every or self._every
        assert every is not None  # `Islands.problems` would have said so
        return min(t - t % every + every, scheduler.last_step)

    def begin(self) -> None:
        """Join the other islands before the first step, and make the exchanges good that have been missed."""
        if not self._has_begun:
            self._has_begun = True
            self._islands.enter(self)
            self.catch_up()

    def after_step(self) -> None:
        """Exchange if an exchange is due directly after the engine's newest step."""
        if self.engine.t == self.next_step(self.t):
            self._take_place()
            self.catch_up()

    def catch_up(self) -> None:
        """Make the exchanges good that took place without this engine: what it has trained since is given up."""
        scheduler = self.engine.lr_scheduler
        while self.t < scheduler.last_step and self.round < self._islands.decided(self):
            before = self.engine.t
            scheduler.move_to(self.next_step(self.t))
            self._replays = True
            self._take_place(self.engine.t - before)
            self._replays = False

    def stop_when(self, is_asked_to_stop: Callable[[], bool]) -> None:
        """Have all ranks raise `Stopped` where it returns True on one of them while the others are waited for.

        What is not complete then is made good from the newest checkpoint.
        """
        self._link.stop_when(is_asked_to_stop)

    def take_reports(self) -> list[ExchangeReport]:
        """Return the reports since the last call."""
        reports, self.reports = self.reports, []
        return reports

    def _take_place(self, made_good_steps: int = 0) -> None:
        self.takes_place = True
        started, before = time.perf_counter(), (self._link.bytes_sent, self._link.bytes_received)
        try:
            if self.engine.frozen.lowrank:
                self.engine.restart()  # which calls `swap`, `update` and `finish`
            else:
                self.swap([], {})
                self.finish()
        finally:
            self.takes_place = False
        moved = torch.tensor([self._link.bytes_sent - before[0], self._link.bytes_received - before[1]])
        moved = moved.to(self.engine.device)
        dist.all_reduce(moved)
        sent, received = moved.tolist()
        seconds = time.perf_counter() - started
        made_good = made_good_steps if self._islands.name in self._who[0] else 0
        self.reports.append(ExchangeReport(self.round, *self._who, sent, received, seconds, self._waited, made_good))

    # -- an exchange --------------------------------------------------------------------------------------------

    def swap(self, factors: Factors, sketches: Mapping[str, Tensor | None]) -> None:
        """Send this island's update and receive those of the others.

        Args:
            factors: of the layers that this rank owns; all finite, fp32.
            sketches: of the gradients of W, `[rows, in]`, summed over this island's ranks, on the owners.
        """
        self.round += 1
        own: dict[str, Any] = {}
        if not self._replays:
            own = self._own(factors, sketches)
            samples = self.engine.train_batch_size() * (self.engine.t - self.t)
            facts = {"samples": samples, "rho": self._rho(), "incarnation": self._islands.incarnation}
            # Before any rank waits for the decision: without a part of every rank this island is in none.
            linked(lambda: self._link.contribute(self.round, own, facts, self._islands.oldest_needed))
        asked = time.perf_counter()
        decision = decision_of(self._link, self.round)
        self._waited = time.perf_counter() - asked
        self._who = tuple(decision.islands), decision.missing
        self._arrived = updates_of(self._link, decision, self._sizes(), own, self._islands.incarnation)

    def update(self, name: str, base: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to add to a merged weight, of its shape, and the squared norm of the mean of `s·B·A`.

        Args:
            base: W in fp32, equal on all islands.
            lora_A: of this island, fp32; where A is frozen it is that of all islands.
        """
        layer = self.engine.frozen.lowrank[name]
        shape_of_B = torch.Size((*layer.experts, layer.out_features, layer.r))
        mean = torch.zeros_like(base)
        for arrived in self._arrived:
            if not layer.one_sided:
                lora_A = arrived.tensor(f"{name}.lora_A", layer.shape_of_A, base.device, self._factor_compression)
            lora_B = arrived.tensor(f"{name}.lora_B", shape_of_B, base.device, self._factor_compression)
            lora_B.mul_(arrived.weight)
            layer.add_update_(mean, lora_A, lora_B)
        norm = mean.square().sum(dtype=torch.float64)
        if layer.decay is not None:
            mean.add_(base, alpha=sum(arrived.weight * (arrived.rho - 1) for arrived in self._arrived))
        return self._outer.step_(f"{name}.weight", mean), norm

    def sketch(self, name: str) -> Tensor | None:
        """Return the mean of the islands' sketches of the gradient of an owned W: that of all batches together."""
        if not self._has_sketches():
            return None
        layer = self.engine.frozen.lowrank[name]
        mean = torch.zeros(sketch_shape(layer.r, layer.in_features))
        for arrived in self._arrived:
            mean.add_(arrived.tensor(_SKETCH + name, mean.shape, mean.device), alpha=arrived.weight)
        return mean

    def finish(self) -> None:
        """Move everything else that trains to the new anchors, and agree with the other islands on all weights."""
        self.t = self.engine.t
        self.engine.shards.drop_gathered_copies()
        for name, owner in self._owners.items():
            if owner == dist.get_rank():
                step = self._outer.step_(name, self._mean(name))
                self._anchors[name] = (self._anchors[name] + step).float()
            self._publish(name, owner)
        self._arrived = []
        digests = self.digests()
        linked(lambda: self._link.agree(self.round, digests))

    def digests(self) -> dict[str, int]:
        """Return checksums of what is equal on all islands, of the weights that this rank owns. Collective."""
        return {name: int(checksum(value.reshape(-1))) for name, value in self._equal()}

    # -- parts of it --------------------------------------------------------------------------------------------

    def _own(self, factors: Factors, sketches: Mapping[str, Tensor | None]) -> dict[str, Any]:
        blobs = {}
        for name, lora_A, lora_B in factors:
            blobs[f"{name}.lora_B"] = _bytes(lora_B, self._factor_compression)
            if name not in self.engine.frozen.one_sided:
                blobs[f"{name}.lora_A"] = _bytes(lora_A, self._factor_compression)
        world_size = dist.get_world_size()
        blobs |= {_SKETCH + name: _bytes(value / world_size) for name, value in sketches.items() if value is not None}
        for name, value in self._masters():
            if self._compression == "none":  # the value itself: of a difference in fp32 the last bit would be lost
                blobs[name] = _bytes(value)
                continue
            update = value.sub_(self._anchors[name])
            if name in self._errors:
                update.add_(self._errors[name])
            packed = compress.pack(update, self._compression)
            self._errors[name] = update.sub_(compress.unpack(packed, update.shape, self._compression))
            blobs[name] = packed.numpy().data
        return blobs

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, value)` of what this rank owns of the rest, fp32 on the CPU."""
        for name, owner in self._owners.items():
            value = self.engine.shards.collect(name, "master", owner)
            if value is not None:
                yield name, value

    def _equal(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is equal on all islands after an exchange, of what this rank owns."""
        frozen = self.engine.frozen
        for name in frozen.layers:
            if (value := frozen.read(name, frozen.device)) is not None:
                yield f"{name}.weight", value
        yield from self._anchors.items()

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of what other islands send to this rank."""
        frozen = self.engine.frozen
        sizes: dict[str, int] = {}
        for name in frozen.owned():
            layer = frozen.lowrank[name]
            shapes = {f"{name}.lora_B": (*layer.experts, layer.out_features, layer.r)}
            if name not in frozen.one_sided:
                shapes[f"{name}.lora_A"] = layer.shape_of_A
            how = self._factor_compression
            sizes |= {blob: compress.num_bytes(torch.Size(shape).numel(), how) for blob, shape in shapes.items()}
            if self._has_sketches():
                sizes[_SKETCH + name] = 4 * torch.Size(sketch_shape(layer.r, layer.in_features)).numel()
        return sizes | {
            name: compress.num_bytes(value.numel(), self._compression) for name, value in self._anchors.items()
        }

    def _has_sketches(self) -> bool:
        relora, scheduler = self.engine.relora, self.engine.lr_scheduler
        return relora is not None and relora.restart_init == "gradient" and scheduler.is_scheduled(self.engine.t)

    def _rho(self) -> float:
        decay = self.engine.frozen.decay
        return 1.0 if decay is None else float(decay)

    def _mean(self, name: str) -> Tensor:
        """Return the mean of the islands' updates in fp64, in which the difference of fp32 values is exact."""
        anchor = self._anchors[name].double()
        mean = torch.zeros_like(anchor)
        for arrived in self._arrived:
            sent = compress.unpack(arrived.bytes_of(name), anchor.shape, self._compression).double()
            mean.add_(sent - anchor if self._compression == "none" else sent, alpha=arrived.weight)
        return mean

    def _publish(self, name: str, owner: int) -> None:
        """Broadcast a new anchor to the island's ranks, and make it what trains."""
        shards, device = self.engine.shards, self.engine.device
        anchor = self._anchors.get(name)
        numel = shards[name].numel
        for start in range(0, numel, PIECE):
            if anchor is None:
                piece = torch.empty(min(PIECE, numel - start), device=device)
            else:
                piece = anchor.view(-1)[start : start + PIECE].to(device, copy=True)
            dist.broadcast(piece, owner)
            shards.write(name, piece, start)
        if self._resets_moments:
            for what in MOMENTS:
                moment = getattr(shards[name], what)
                moment.write(torch.zeros(moment.numel()))

    # -- checkpoints --------------------------------------------------------------------------------------------

    def held(self) -> dict[str, Tensor]:
        """Return what this rank has to write, fp32 on the CPU; the tensors stay as they are."""
        return {
            **{_ANCHOR + name: value.clone() for name, value in self._anchors.items()},
            **{_ERROR + name: value.clone() for name, value in self._errors.items()},
            **{_MOMENTUM + name: value for name, value in self._outer.held().items()},
        }

    def state(self) -> dict[str, Any]:
        """Return counters and the origin, as JSON. Called for a checkpoint."""
        self._islands.note_checkpoint(self.round)
        return {"round": self.round, "t": self.t, "origin": self.origin}

    def restore(self, state: dict[str, Any] | None, t: int, read: Callable[[str], Tensor | None]) -> None:
        """Continue from what `state` and `held` returned, with masters that are in place.

        Args:
            state: None where the checkpoint is of a run without islands, which begin then from its weights.
            t: the engine's step.
            read: a tensor of that name, or None.
        """
        self.round, self.t, self.origin = (state["round"], state["t"], state["origin"]) if state else (0, t, "")
        for name, value in self._masters():
            found = read(_ANCHOR + name) if state else None
            self._anchors[name] = value if found is None else found
        errors = {name: read(_ERROR + name) for name in self._anchors} if state else {}
        self._errors = {name: value for name, value in errors.items() if value is not None}
        owned = [f"{name}.weight" for name in self.engine.frozen.owned()]
        self._outer.restore([*owned, *self._anchors], lambda name: read(_MOMENTUM + name) if state else None)


def _bytes(value: Tensor, compression: str = "none") -> memoryview:
    """Return the bytes that are sent of an fp32 tensor."""
    return compress.pack(value.detach().to("cpu", torch.float32), compression).numpy().data

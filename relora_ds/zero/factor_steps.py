"""Optimizer steps of weights that are products of factors: what trains of the factors is sent, and nothing of W's size.

    a round begins         each owner decomposes its weights, and broadcasts the factors to all ranks
    in every backward      each layer adds its gradient of W to an fp32 sum on its device
    at the boundary        `gather`: each rank projects its sums onto what trains; the projections are reduced to the
                           owners, who tell their norms
    after DeepSpeed's step `apply`: the owners update the factors, each with the moments that it has, and broadcast what
                           has changed. All ranks form W anew, and store it as forward reads it

All ranks compute W from the same bits, in the same way, which needs devices of one kind. They compare what they hold
after the first step, and from time to time. A projection is linear: that of a sum over ranks is the sum of theirs.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.lowrank.precision import exact_products
from relora_ds.matrix.factored import FactoredOptimizer
from relora_ds.matrix.optimizer import MatrixOptimizer, State
from relora_ds.zero.frozen_master import FrozenWeights
from relora_ds.zero.joint_norm import JointNorm
from relora_ds.zero.owner_steps import COPIES, OwnerSteps
from relora_ds.zero.shards import ShardView
from relora_ds.zero.verify_ranks import checksum, verify

VERIFIED_EVERY = 200  # steps


class FactorSteps(OwnerSteps):
    """The optimizer of owned weights that are products of factors. Collective: all ranks make every call.

    The norm that clipping sees is that of what trains of the factors. Nothing is added to W: its master, where there is
    one, is the product of the factors.

    Args:
        optimizers, lr, seed: see `OwnerSteps`. There is no weight decay: nothing but the factors changes W.
    """

    reads_weights = False
    _overlaps = False

    def __init__(
        self,
        frozen: FrozenWeights,
        shards: ShardView,
        joint: JointNorm,
        optimizers: Mapping[str, FactoredOptimizer],
        *,
        lr: float,
        seed: int,
    ):
        self._rules, self._factors = optimizers, dict[str, State]()
        self._new: list[str] = []  # to be decomposed when the coming step finds it
        self._moved: list[str] = []  # has a gradient in this step
        self._is_verified = False
        super().__init__(frozen, shards, joint, optimizers, lr=lr, weight_decay=0.0, seed=seed)

    @torch.no_grad()
    def gather(self, loss_scale: float) -> None:
        """Reduce the projected gradients of an optimizer step to the owners; see `OwnerSteps.gather`."""
        self._begin_step(self._new)
        self._new = []
        projections, works = {}, []
        for name in self._frozen.layers:
            total = self._sums.own(name)
            with exact_products():
                projections[name] = self._rules[name].project(total, self._factors[name])
            total.zero_()
            works.append(dist.reduce(projections[name], self._frozen.owners[name], async_op=True))
        squares = torch.zeros(len(projections), dtype=torch.float64, device=self._frozen.device)
        for work, (name, projected), square in zip(works, projections.items(), squares, strict=True):
            work.wait()
            if name in self._states:
                self._gradients[name] = projected.div_(dist.get_world_size() * loss_scale)
                square.copy_(projected.square().sum(dtype=torch.float64))
        own = squares[[name in self._states for name in projections]]
        dist.all_reduce(squares)
        self._tell_norm(squares.sum(), own)
        self._moved = [name for name, square in zip(projections, squares.tolist(), strict=True) if square]

    @torch.no_grad()
    def apply(self, t: int, factor: float, coefficient: float) -> None:
        """Update the factors by what `gather` has gathered, and form the weights; see `OwnerSteps.apply`."""
        self._shards.drop_gathered_copies()
        frozen, sent, formed = self._frozen, {}, dict[str, Tensor]()
        verifies = t % VERIFIED_EVERY == 0 or not self._is_verified
        with exact_products():
            for name in self._moved:
                rule, state = self._rules[name], self._factors[name]
                if name in self._states:
                    rule.train(self._gradients.pop(name).mul_(coefficient), state, self._lr * factor)
                changed = rule.changed(state)
                sent[name] = changed, dist.broadcast(changed, frozen.owners[name], async_op=True)
            for name, (changed, work) in sent.items():
                work.wait()
                if name not in self._states:
                    self._rules[name].follow(changed, self._factors[name])
                stored = self._store(name)
                if name in self._states and verifies:
                    formed[name] = checksum(stored.reshape(-1))
        frozen.masters.settle()
        self._gradients.clear()
        self._begin_step(self._moved)
        if verifies:
            verify(self._shards, frozen, formed, device=frozen.device, what="steps of factors")
            self._is_verified = True

    @property
    def sends_more(self) -> bool:
        """Whether the coming step also sends factors: at its beginning or, of the step after it, at its end."""
        return bool(self._new) or any(
            rule.begins_factors({**self._factors[name], "step": self._factors[name]["step"] + 1})
            for name, rule in self._rules.items()
        )

    def step_bytes(self) -> dict[str, int]:
        """Return the payload of a step, by collective: what trains of the factors, once in each direction."""
        once = sum(rule.changed(self._factors[name]).nbytes for name, rule in self._rules.items())
        return {"reduce": once, "broadcast": once}

    def restore(self, read: Callable[[str], Tensor] | None) -> None:
        """Continue from what `held` returned, of the weights that this rank owns now; None: begin anew."""
        super().restore(read)
        if read is None:
            return
        self._share(self._frozen.layers)
        self._new = [name for name, state in self._factors.items() if not int(state["step"])]

    def _begin(self) -> dict[str, State]:
        """Return the states of the owned weights; all ranks hold what is shared of all."""
        frozen, self._factors, self._new = self._frozen, {}, list(self._frozen.layers)
        for name, layer in frozen.layers.items():
            state = self._rules[name].begin(layer.shape_of_gradient, frozen.device)
            if frozen.owners[name] != dist.get_rank():
                state = {what: state[what] for what in self._rules[name].shared}
            self._factors[name] = state
        return {name: self._factors[name] for name in frozen.owned()}

    def _begin_step(self, names: Iterable[str]) -> None:
        """Decompose what is due, and choose what trains in the coming step."""
        due = [name for name in names if self._rules[name].begins_factors(self._factors[name])]
        for of_owners in self._frozen.rounds():  # so that they decompose at the same time
            weights = {name: self._first_weight(name) for name in of_owners if name in due}
            for name, weight in weights.items():
                if name in self._states:
                    with exact_products():
                        self._rules[name].decompose(self._factors[name], weight)
        self._share(due)
        for name in names:
            self._rules[name].begin_step(self._factors[name], f"{self._seed}/{name}")

    def _first_weight(self, name: str) -> Tensor | None:
        """Return W on its owner, `[out, in]`, before the first step of its factors. Collective."""
        if int(self._factors[name]["step"]):
            return None
        weight = self._frozen.read(name, self._frozen.device)
        return weight.mT if weight is not None and self._frozen.layers[name].transposed else weight

    def _share(self, names: Iterable[str]) -> None:
        """Give all ranks what the owners have of the factors."""
        for name in names:
            for what in self._rules[name].shared:
                value = self._factors[name][what]
                on_device = value.to(self._frozen.device)  # counts are on the CPU, where NCCL cannot send them
                dist.broadcast(on_device, self._frozen.owners[name])
                value.copy_(on_device)

    def _store(self, name: str) -> Tensor:
        """Form W from the factors, and store it as forward reads it. Returns the stored copy."""
        frozen, weight = self._frozen, self._rules[name].product(self._factors[name])
        if frozen.layers[name].transposed:
            weight = weight.mT.contiguous()
        if name in self._states:
            frozen.keep(name, weight)
        stored = frozen.quantize(weight)
        frozen.put(name, stored)
        return stored


def peak_bytes(shapes: Mapping[str, torch.Size], sent: Mapping[str, int]) -> int:
    """Return the most bytes that a step has on the device of any rank beside what is kept, at every stage.

    It is what trains of all factors, as gradients or as what has changed of them, and some copies of the largest
    weight: all ranks project its gradient and form it, and its owner decomposes it. The workspace of the library that
    decomposes is not known.

    Args:
        shapes: of the weights, by layer.
        sent: bytes of what a step changes of the factors, by layer.
    """
    return sum(sent.values()) + 4 * COPIES * max(shape.numel() for shape in shapes.values())


def owner_steps_of(
    optimizers: Mapping[str, MatrixOptimizer],
    frozen: FrozenWeights,
    shards: ShardView,
    joint: JointNorm,
    *,
    lr: float,
    weight_decay: float,
    seed: int,
) -> OwnerSteps:
    """Return the steps by these rules, which are all of factors or none."""
    factored = {name: rule for name, rule in optimizers.items() if isinstance(rule, FactoredOptimizer)}
    if factored:
        assert len(factored) == len(optimizers) and not weight_decay, "`rule_problems` names it"
        return FactorSteps(frozen, shards, joint, factored, lr=lr, seed=seed)
    return OwnerSteps(frozen, shards, joint, optimizers, lr=lr, weight_decay=weight_decay, seed=seed)

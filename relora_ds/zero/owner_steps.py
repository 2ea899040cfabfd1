"""Optimizer steps of whole matrices, by the owners of the weights: ZeRO's shards have parts of a gradient only.

    in every backward      each layer adds its gradient of W to an fp32 sum on its device. The last one of a step starts
                           to reduce each sum to the owner as soon as it is complete
    at the boundary        `gather`: the owners tell their norms. DeepSpeed clips its own gradients by the norm of all,
                           and skips the step where any is not finite
    after DeepSpeed's step `apply`: each owner updates its fp32 master, one layer at a time, and broadcasts the stored
                           copy, as at a merge; where the step was skipped, `drop`

So no state moves before all ranks know that the step is taken. The arithmetic is the same at every ZeRO stage.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.lowrank.targets import summary
from relora_ds.matrix.optimizer import MatrixOptimizer, State
from relora_ds.zero.frozen_master import FrozenWeights
from relora_ds.zero.gradient_sums import GradientSums
from relora_ds.zero.joint_norm import JointNorm
from relora_ds.zero.shards import ShardView

COPIES = 5  # of a weight in fp32: what the rules have alive at once beside the gradient, and more than adding needs
_FIRST = 2  # steps, in which a weight may have no gradient: behind a layer that begins with zeros, the first has none


class OwnerSteps:
    """The optimizer of the owned weights. Collective: all ranks make every call.

    Args:
        optimizers: by layer; the same settings on every rank.
        lr: peak learning rate.
        weight_decay: decoupled, of W.
        seed: with the layer's name decides what is random.
    """

    argument = "matrix_optimizer"  # of `initialize`
    reads_weights = True  # to add to them
    _overlaps = True  # gradients are reduced while others are computed

    def __init__(
        self,
        frozen: FrozenWeights,
        shards: ShardView,
        joint: JointNorm,
        optimizers: Mapping[str, MatrixOptimizer],
        *,
        lr: float,
        weight_decay: float,
        seed: int,
    ):
        self._frozen, self._shards, self._joint, self._optimizers = frozen, shards, joint, optimizers
        self._lr, self._weight_decay, self._seed = lr, weight_decay, seed
        self._sums = GradientSums(frozen, overlaps=self._overlaps)
        self._gradients: dict[str, Tensor] = {}
        self._never_trained, self._gathered = {name for name in frozen.owned() if "expert" not in name}, 0
        self._states = self._begin()

    def begin_backward(self, *, is_last: bool) -> None:
        """Tell of the coming backward. is_last: of its optimizer step."""
        self._sums.begin_backward(is_last=is_last)

    @torch.no_grad()
    def gather(self, loss_scale: float) -> None:
        """Reduce the gradients of an optimizer step to the owners.

        Args:
            loss_scale: that they have; it is taken out.

        Raises:
            ValueError: on every rank, where no gradient has reached a weight in the first steps; names it.
        """
        squares = []
        self._sums.start_left()
        for names in self._frozen.rounds():
            for name in names:
                if (gradient := self._sums.reduce(name)) is None:
                    continue
                gradient.div_(loss_scale)
                self._gradients[name] = gradient
                squares.append(gradient.square().sum(dtype=torch.float64))
        own = torch.stack(squares) if squares else torch.zeros(1, dtype=torch.float64, device=self._frozen.device)
        total = own.sum()
        dist.all_reduce(total)
        self._tell_norm(total, own)

    @torch.no_grad()
    def apply(self, t: int, factor: float, coefficient: float) -> None:
        """Update the weights by what `gather` has gathered.

        Args:
            t: applied steps, this one among them.
            factor: the learning rate of this step, as a part of the peak.
            coefficient: what clipping multiplies gradients with.
        """
        self._shards.drop_gathered_copies()
        frozen, samples = self._frozen, {}
        for names in frozen.rounds():
            # Before W is read: the device has room for one of the two.
            changes = {
                name: self._change(name, self._lr * factor, coefficient) for name in names if name in self._states
            }
            stored: dict[str, Tensor] = {}
            for name in names:
                if (base := frozen.read(name, frozen.device)) is not None:
                    change = self._with_decay(name, changes.pop(name), base, self._lr * factor)
                    stored[name], samples[name] = frozen.add(name, base, change, f"{self._seed}/{t}/{name}.weight/step")
            for name in names:
                frozen.publish(name, stored.pop(name, None), frozen.device)
        frozen.masters.settle()
        frozen.add_to_ledgers(samples)
        self._gradients.clear()

    @property
    def sends_more(self) -> bool:
        """Whether the coming step sends more than others."""
        return False

    def step_bytes(self) -> dict[str, int]:
        """Return the payload of a step, by collective: every gradient in fp32, and every weight as it is stored."""
        layers = self._frozen.layers.values()
        stored = sum(layer.weight_shape.numel() * layer.weight.element_size() for layer in layers)
        return {"reduce": 4 * sum(layer.weight_shape.numel() for layer in layers), "broadcast": stored}

    def drop(self) -> None:
        """Forget what `gather` has gathered: the step is not taken."""
        self._sums.drop()
        self._gradients.clear()

    def held(self) -> dict[str, Tensor]:
        """Return the owned states by `LAYER/WHAT`, on the CPU; later steps do not change them."""
        return {
            f"{name}/{what}": value.detach().to("cpu", copy=True)
            for name, state in self._states.items()
            for what, value in state.items()
        }

    def about(self) -> str:
        """Return the optimizers and their settings, as a text; by layer where they differ."""
        texts = {name: repr(optimizer) for name, optimizer in self._optimizers.items()}
        if len({*texts.values()}) == 1:
            return next(iter(texts.values()))
        return ", ".join(f"{name}: {texts[name]}" for name in self._frozen.layers)

    def names(self) -> list[str]:
        """Return the names of what `held` returns on this rank."""
        return [f"{name}/{what}" for name, state in self._states.items() for what in state]

    def restore(self, read: Callable[[str], Tensor] | None) -> None:
        """Continue from what `held` returned, of the weights that this rank owns now; None: begin anew."""
        self.drop()
        self._states = self._begin()
        if read is None:
            return
        for name, state in self._states.items():
            for what, value in state.items():
                value.copy_(read(f"{name}/{what}").view(value.shape))

    def _begin(self) -> dict[str, State]:
        frozen = self._frozen
        return {
            name: self._optimizers[name].begin(frozen.layers[name].shape_of_gradient, frozen.device)
            for name in frozen.owned()
        }

    def _tell_norm(self, total: Tensor, squares: Tensor) -> None:
        """Tell DeepSpeed the norm of what owners train. squares: of the gradients that this rank has gathered."""
        norm = float(total.sqrt())
        self._joint.owners = norm if math.isfinite(norm) else math.inf
        if self._gathered == _FIRST:
            return
        self._gathered += 1
        self._never_trained -= {name for name, square in zip(self._gradients, squares.tolist(), strict=False) if square}
        if self._gathered < _FIRST:
            return
        found: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, sorted(self._never_trained))
        if names := sorted({name for rank in found for name in rank}):
            raise ValueError(
                f"relora.target_modules: no gradient has reached {summary(names)} in {_FIRST} steps: it is not called, "
                "or its result is not used; leave it out with relora.exclude_modules"
            )

    def _change(self, name: str, lr: float, coefficient: float) -> Tensor:
        """Return what the rule adds to an owned weight, in its own layout."""
        layer, gradient = self._frozen.layers[name], self._gradients.pop(name)
        if coefficient != 1:
            gradient.mul_(coefficient)
        change = self._optimizers[name].update(gradient, self._states[name], lr, f"{self._seed}/{name}")
        gradient.zero_()
        return change.mT if layer.transposed else change

    def _with_decay(self, name: str, change: Tensor, base: Tensor, lr: float) -> Tensor:
        """Return the change of W by the rule and by weight decay."""
        if decay := lr * self._weight_decay:
            # W' = (1 - decay)·W + change, or (1 - decay)·(W + change): as the method's authors have it.
            change = change if self._optimizers[name].decays_first else change.mul_(1 - decay)
            change = change.add_(base, alpha=-decay)
        return change

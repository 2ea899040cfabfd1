"""The subspace of the next cycle: what `lora_A` becomes at a restart, over all ranks (see `lowrank.reinit`).

In the step before a scheduled restart the layers take along what a basis is computed from. At the restart each layer's
owner gets the sum over all ranks, computes the basis in fp32 and sends it: decompositions differ in their last bits and
in their signs between kinds of processors, so that ranks that computed it for themselves would drift apart.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.reinit import GradientSketch, dominant_rows, random_basis, warm_rows
from relora_ds.zero.adam_state import MOMENTS
from relora_ds.zero.exact_gradients import ExactGradients
from relora_ds.zero.frozen_master import FrozenWeights
from relora_ds.zero.shards import ShardView


def watch_gradients(engine, due: bool) -> None:
    """Have the layers take W's gradient along in a step that a scheduled restart follows; else take nothing.

    Call it before the first forward of a step. Collective with `gradient_estimate: warm_sketch`.
    """
    frozen, config = engine.frozen, engine.relora
    engine.exact_gradients = None
    for layer in frozen.lowrank.values():
        layer.sketch = None
    if not due:
        return
    if config.gradient_estimate == "exact":
        engine.exact_gradients = ExactGradients(frozen)
        return
    for name, layer in frozen.lowrank.items():
        key, omega = f"{engine.seed}/{engine.t}/{name}/sketch", None
        if config.gradient_estimate == "warm_sketch":
            lora_B = f"{name}.lora_B"
            omega = warm_rows(engine.shards.gather([lora_B], "exp_avg")[lora_B], key)
        layer.sketch = GradientSketch(layer.r, layer.in_features, key, engine.device, omega)


def takes_gradients_along(engine) -> bool:
    """Return whether the layers of an engine take W's gradient along in this step; see `watch_gradients`."""
    return any(layer.sketch is not None for layer in engine.frozen.lowrank.values())


@dataclass(frozen=True)
class Subspaces:
    """How the bases of the next cycle are chosen.

    Attributes:
        number: of the restart, from 1.
        exact: the gradients of the last step, where they were taken along.
        own_seed: decides A where both factors train; None: `seed`.
    """

    config: ReLoRAConfig
    seed: int
    number: int
    device: torch.device
    exact: ExactGradients | None = None
    own_seed: str | None = None

    def gradients(self, frozen: FrozenWeights) -> dict[str, Tensor | None]:
        """Return what each layer's basis is computed from, a sum over the ranks, on its owner. Collective."""
        return {name: self._gradient(name, frozen) for name in frozen.lowrank}

    def choose(self, frozen: FrozenWeights, gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return the new A of every layer, `[..., r, in]` in fp32, on its owner; None elsewhere.

        Of Kaiming's, which are known by their key, every rank has all. gradients: see there; used up.
        """
        if self.config.restart_init == "kaiming":
            return {name: self._initial(name, layer) for name, layer in frozen.lowrank.items()}
        return {
            name: self._basis(name, frozen.lowrank[name], gradients.pop(name)) if _is_mine(frozen, name) else None
            for name in list(gradients)
        }

    def on_every_rank(self, value: Tensor | None, name: str, frozen: FrozenWeights) -> Tensor:
        """Return on every rank what `choose` returned. Collective."""
        if self.config.restart_init == "kaiming":
            assert value is not None
            return value
        sent = torch.empty(frozen.lowrank[name].shape_of_A, device=self.device) if value is None else value
        sent = sent.to(self.device).contiguous()
        dist.broadcast(sent, frozen.owners[name])
        return sent

    def _gradient(self, name: str, frozen: FrozenWeights) -> Tensor | None:
        """Return the sum over the ranks of what a layer took along, on its owner."""
        layer = frozen.lowrank[name]
        if self.exact is not None:
            return self.exact.take(name)
        if self.config.restart_init != "gradient" or layer.sketch is None:  # a restart by hand comes without
            return None
        assert isinstance(layer.sketch, GradientSketch)
        sketch, layer.sketch = layer.sketch.values, None
        dist.reduce(sketch, frozen.owners[name])
        return sketch if _is_mine(frozen, name) else None

    def _basis(self, name: str, layer: LowRankLayer, gradient: Tensor | None) -> Tensor:
        basis = None if gradient is None else dominant_rows(gradient.to(self.device), layer.r)
        if basis is None and self.config.restart_init == "gradient" and not layer.one_sided:
            return self._initial(name, layer)
        if basis is None:
            basis = random_basis(layer.shape_of_A, f"{self.seed}/{self.number}/{name}")
        return basis * layer.row_norm

    def _initial(self, name: str, layer: LowRankLayer) -> Tensor:
        return layer.initial_A(name, seed=self.own_seed or self.seed, restart=self.number)


@torch.no_grad()
def begin_chain(shards: ShardView, frozen: FrozenWeights, seed: int, number: int) -> None:
    """Give the factors what they begin with, without moments. Collective. number: of the restarts so far."""
    for name, layer in frozen.lowrank.items():
        write_initial_A(shards, frozen, name, layer, seed=seed, number=number)
        shards.write(f"{name}.lora_B", torch.zeros(shards[f"{name}.lora_B"].shape))
        for factor in ("lora_B",) if layer.one_sided else ("lora_A", "lora_B"):
            shard = shards[f"{name}.{factor}"]
            for what in MOMENTS:
                moment = getattr(shard, what)
                moment.write(torch.zeros(moment.numel()))


def write_initial_A(
    shards: ShardView, frozen: FrozenWeights, name: str, layer: LowRankLayer, *, seed: int, number: int
) -> None:
    """Give a layer the A that a chain begins with; nothing is sent where it is Kaiming's. number: of the restarts."""
    if not layer.one_sided:
        shards.write(f"{name}.lora_A", layer.initial_A(name, seed=seed, restart=number))
    else:  # its owner's counts: decompositions differ in their bits between kinds of processors
        frozen.publish_A(name, layer.initial_A(name, seed=seed, restart=number) if _is_mine(frozen, name) else None)


def _is_mine(frozen: FrozenWeights, name: str) -> bool:
    return frozen.owners[name] == dist.get_rank()

"""The phases of a run, and the engine of each.

A run is a warm start (optional; by full rank or another method) and then the recipe's method. A phase transition is a
resume: the weights are collected by name from the masters of one engine, spread over the ranks, the engine is torn
down, and a fresh one is filled with them. Random weights, pretrained ones and `init_from` enter at the same place.
"""

import logging
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from relora_ds.config import Recipe
from relora_ds.config.curve import decay_length
from relora_ds.exchange.island import Islands
from relora_ds.interop.sources import weights_of
from relora_ds.lowrank.schedule import scheduled_restarts
from relora_ds.lowrank.wrap import is_lora_parameter
from relora_ds.methods import Method, method_of, methods_of
from relora_ds.models import compilation, liger, recompute
from relora_ds.models.build import initial_weights, meta_model, model_without_values
from relora_ds.training.preflight import Plan
from relora_ds.zero.adam_state import MOMENTS
from relora_ds.zero.collect import collect_moments, collect_owned
from relora_ds.zero.engine import ReLoRAEngine
from relora_ds.zero.fill import fill_moments
from relora_ds.zero.initialize import initialize
from relora_ds.zero.subspaces import takes_gradients_along
from relora_ds.zero.teardown import release
from relora_ds.zero.weights import NOTHING, Nothing, OwnedWeights, WeightSource, readers_of

logger = logging.getLogger(__name__)

WARM_START = "warm_start"  # the name of the phase


@dataclass(frozen=True)
class Phase:
    """Optimizer steps [start, stop) of the run under one method and one learning-rate curve.

    Attributes:
        total_steps, warmup_steps, schedule, decay_steps: of the curve. The warm start's spans the whole run and is cut
            at the transition; instead of wsd it is constant, because it has no decay. The low-rank phase has a curve
            of its own.
    """

    name: str
    method: Method
    start: int
    stop: int
    lr: float
    total_steps: int
    warmup_steps: int
    schedule: str
    decay_steps: int | None = None

    @property
    def restarts(self) -> list[int]:
        """The scheduled restarts, in steps of the run. What ends a phase is merged anyway."""
        every = None if self.method.relora is None else self.method.relora.restart_every
        return [self.start + t for t in scheduled_restarts(self.stop - self.start, every)]


@dataclass
class HandOver:
    """What survives of an engine, spread over the ranks: fp32 weights of the plain model and, if asked for, moments.

    Attributes:
        moments: by kind: "exp_avg", "exp_avg_sq".
    """

    weights: OwnedWeights
    moments: dict[str, OwnedWeights]
    adam_steps: dict[str, int]


def phases_of(recipe: Recipe) -> list[Phase]:
    """Return the phases of a recipe, in order."""
    optim, method = recipe.optim, method_of(recipe)
    warm = method.warm_start_steps
    last_steps, decays_late = recipe.total_steps - warm, optim.schedule == "wsd"
    decay = decay_length(last_steps, optim.decay_steps) if decays_late else None
    phases = []
    if warm:
        ramp = optim.warmup_steps if optim.warm_start_warmup_steps is None else optim.warm_start_warmup_steps
        lr = optim.lr if optim.warm_start_lr is None else optim.warm_start_lr
        schedule = "constant" if decays_late else optim.schedule
        phases.append(Phase(WARM_START, methods_of(recipe)[0], 0, warm, lr, recipe.total_steps, ramp, schedule))
    curve = last_steps, optim.warmup_steps, optim.schedule, decay
    phases.append(Phase(method.name, method, warm, recipe.total_steps, optim.lr, *curve))
    return phases


def build_engine(
    plan: Plan,
    phase: Phase,
    handover: HandOver | None = None,
    resuming: bool = False,
    islands: Islands | None = None,
) -> ReLoRAEngine:
    """Build a fresh engine for `phase`: random, pretrained or `init_from` weights, or those of the engine before it.

    islands: what the engine is one of.
    resuming: a checkpoint will be loaded into it, so it needs no values; what the run began from may be gone.
    """
    recipe = plan.recipe
    model = phase.method.prepare(model_without_values(plan.model_config, recipe.model))
    if recipe.model.use_liger_kernel:
        liger.apply(model)
    recompute.apply(model, recipe.activation_checkpointing)
    engine, *_ = initialize(
        model,
        plan.deepspeed,
        phase.method.relora,
        lr=phase.lr,
        total_steps=phase.total_steps,
        warmup_steps=phase.warmup_steps,
        min_lr_ratio=recipe.optim.min_lr_ratio,
        schedule=phase.schedule,
        decay_steps=phase.decay_steps,
        betas=(recipe.optim.betas[0], recipe.optim.betas[1]),
        eps=phase.method.recipe.optim.eps,
        precision=plan.precision,
        micro_batch_size=recipe.train.micro_batch_size,
        gradient_accumulation_steps=plan.accumulation,
        max_grad_norm=recipe.optim.max_grad_norm,
        weight_decay=recipe.optim.weight_decay,
        optimizer=recipe.optim.name,
        param_groups=phase.method.param_groups(model),
        matrix_optimizer=phase.method.matrix_optimizers(model),
        matrix_lr=recipe.optim.matrix_lr if phase.method.has_owners else None,
        switching=phase.method.switching,
        seed=phase.method.recipe.seed,
        after_step=phase.method.after_step,
        weights=_weights(plan, model, handover, resuming),
        islands=islands,
    )
    engine.lr_scheduler.stop = phase.stop - phase.start
    if recipe.compile and plan.stage < 3:  # at stage 3 it would compile DeepSpeed's hooks around every layer
        compilation.apply(engine.module, unless=lambda: takes_gradients_along(engine))
    if handover is not None and handover.moments:
        for what, source in handover.moments.items():
            fill_moments(engine.shards, what, source, engine.device)
        engine.shards.set_adam_steps(handover.adam_steps)
    return engine


def _weights(plan: Plan, model: PreTrainedModel, handover: HandOver | None, resuming: bool) -> WeightSource | Nothing:
    """Return where the weights of an engine on `model` come from."""
    recipe = plan.recipe
    if resuming:
        return NOTHING
    if handover is not None:
        return handover.weights
    if recipe.init_from:
        return weights_of(recipe.init_from, recipe.trust_remote_code, "init_from")
    config: Any = model.config
    return initial_weights(config, recipe.model, recipe.seed, recipe.trust_remote_code)


def hand_over(engine: ReLoRAEngine, plan: Plan, phase: Phase) -> HandOver:
    """Collect what `phase` takes over from `engine`, each tensor on one rank, and release the engine. Collective."""
    prepared = phase.method.prepare(meta_model(plan.model_config))
    owners = readers_of(prepared)
    moments, steps = {}, {}
    if plan.recipe.carry_moments:
        trains = {
            name: owners[name]
            for name, p in prepared.named_parameters()
            if p.requires_grad and name in engine.shards.names and not is_lora_parameter(name)
        }
        moments = {what: collect_moments(engine.shards, what, trains) for what in MOMENTS}
        steps = {group: step for group, step in engine.shards.adam_steps().items() if not group.startswith("lora")}
    weights = collect_owned(engine.module, engine.shards, engine.frozen, device=engine.device, owners=owners)
    release(engine)
    return HandOver(weights, moments, steps)

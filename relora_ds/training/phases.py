"""The phases of a run, and the engine of each.

A run is a full-rank warm start (optional) and then the recipe's method. Going from one to the next is a
resume: the weights are collected by name from the masters of one engine, the engine is torn down, and a
fresh module takes them over. `init_from` enters at the same place.
"""

import dataclasses
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from relora_ds.config import Recipe
from relora_ds.interop.sources import weights_of
from relora_ds.lowrank.wrap import is_lora_parameter
from relora_ds.methods import Full, Method, method_of
from relora_ds.models import compilation, liger, recompute
from relora_ds.models.build import build_model, meta_model
from relora_ds.training.preflight import Plan
from relora_ds.zero.engine import ReLoRAEngine, initialize
from relora_ds.zero.plain_model import load_plain
from relora_ds.zero.shards import MOMENTS
from relora_ds.zero.teardown import release

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """Optimizer steps [start, stop) of the run under one method and one learning-rate curve.

    Attributes:
        total_steps, warmup_steps: of the curve. The warm start's cosine spans the whole run and is cut at
            the switch; the low-rank phase has a curve of its own.
    """

    name: str
    method: Method
    start: int
    stop: int
    lr: float
    total_steps: int
    warmup_steps: int


@dataclass
class HandOver:
    """What survives of an engine: fp32 weights of the plain model on CPU and, if asked for, Adam moments by name."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    adam_steps: dict[str, int]


def phases_of(recipe: Recipe) -> list[Phase]:
    """The phases of a recipe, in order."""
    optim, method = recipe.optim, method_of(recipe)
    warm = recipe.full_rank_steps if recipe.full_rank_steps < recipe.total_steps else 0
    phases = []
    if warm:
        ramp = optim.warmup_steps if optim.warm_start_warmup_steps is None else optim.warm_start_warmup_steps
        lr = optim.lr if optim.warm_start_lr is None else optim.warm_start_lr
        phases.append(Phase("warm_start", Full(recipe), 0, warm, lr, recipe.total_steps, ramp))
    phases.append(Phase(recipe.method, method, warm, recipe.total_steps, optim.lr, recipe.total_steps - warm,
                        optim.warmup_steps))
    return phases


def build_engine(plan: Plan, phase: Phase, handover: HandOver | None = None, resuming: bool = False) -> ReLoRAEngine:
    """A fresh engine for `phase`: random, pretrained or `init_from` weights, or those of the engine before it.

    resuming: a checkpoint will be loaded into it, and whatever the run began from may be gone: random weights do.
    """
    recipe = plan.recipe
    source = dataclasses.replace(recipe.model, init="random") if resuming else recipe.model
    model = build_model(plan.model_config, source, recipe.seed, recipe.trust_remote_code)
    if handover is not None:
        load_plain(model, handover.weights)
        handover.weights.clear()
    elif recipe.init_from and not resuming:
        weights = weights_of(recipe.init_from, recipe.trust_remote_code)
        load_plain(model, {name: weights.read(name) for name in weights.shapes})
    model = phase.method.prepare(model)
    if recipe.model.use_liger_kernel:
        liger.apply(model)
    recompute.apply(model, recipe.activation_checkpointing)
    engine, *_ = initialize(
        model, plan.deepspeed, phase.method.relora, lr=phase.lr, total_steps=phase.total_steps,
        warmup_steps=phase.warmup_steps, min_lr_ratio=recipe.optim.min_lr_ratio, betas=tuple(recipe.optim.betas),
        eps=recipe.optim.eps, precision=plan.precision, micro_batch_size=recipe.train.micro_batch_size,
        gradient_accumulation_steps=plan.accumulation, max_grad_norm=recipe.optim.max_grad_norm,
        weight_decay=recipe.optim.weight_decay, param_groups=phase.method.param_groups(model), seed=recipe.seed,
        after_step=phase.method.after_step)
    if recipe.compile and plan.stage < 3:  # at stage 3 it would compile DeepSpeed's hooks around every layer
        compilation.apply(engine.module)
    if handover is not None and handover.moments:
        _take_over_moments(engine, handover)
    return engine


def hand_over(engine: ReLoRAEngine, plan: Plan, phase: Phase) -> HandOver:
    """Collect what `phase` takes over from `engine`, and release the engine. Collective."""
    moments, steps = {}, {}
    if plan.recipe.carry_moments:
        prepared = phase.method.prepare(meta_model(plan.model_config))
        names = [n for n, p in prepared.named_parameters() if p.requires_grad and n in engine.shards.names]
        for what in MOMENTS:
            for name in names:
                moments.setdefault(name, {})[what] = engine.shards.gather([name], what)[name].cpu()
        steps = {group: step for group, step in engine.shards.adam_steps().items() if group != "lora"}
    weights = engine.collect_merged()
    release(engine)
    return HandOver(weights, moments, steps)


@torch.no_grad()
def _take_over_moments(engine: ReLoRAEngine, handover: HandOver) -> None:
    for name, moments in handover.moments.items():
        assert not is_lora_parameter(name)
        shard = engine.shards[name]
        for what, value in moments.items():
            getattr(shard, what).copy_(shard.slice(value))
    engine.shards.set_adam_steps(handover.adam_steps)


"""`initialize`: DeepSpeed's 4-tuple, with an engine that restarts inside `engine.step()`.

The engine is DeepSpeed's own with its class specialised (`zero.engine.ReLoRAEngine`), so
`isinstance(engine, DeepSpeedEngine)`, `engine.module` and every other attribute keep working.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import deepspeed
import torch.distributed as dist
from torch import nn

from relora_ds.config import ReLoRAConfig
from relora_ds.config.curve import ScheduleConfig
from relora_ds.config.switch_config import SwitchLoRAConfig
from relora_ds.lowrank.formats import DTYPES
from relora_ds.lowrank.orthogonal import orthogonal_update
from relora_ds.lowrank.storage import storage_problems, storage_warnings
from relora_ds.lowrank.ties import align_tie_flag
from relora_ds.lowrank.words import for_everyone
from relora_ds.lowrank.wrap import full_shape, owned_layers, parameter_groups
from relora_ds.matrix.optimizer import MatrixOptimizer
from relora_ds.zero import accelerator, ds_adamw, ds_config, ds_types, optimizers
from relora_ds.zero.allocate import allocate, nothing_broadcast
from relora_ds.zero.arguments import (
    argument_problems,
    by_layer,
    carried_config,
    given,
    matrix_problems,
    rule_problems,
    schedule_problems,
    switching_partition_problems,
    switching_problems,
)
from relora_ds.zero.checkpoints import EngineCheckpoints
from relora_ds.zero.ds_config import ARGUMENT_NAMES
from relora_ds.zero.ds_resolve import resolve
from relora_ds.zero.engine import ReLoRAEngine
from relora_ds.zero.factor_steps import owner_steps_of
from relora_ds.zero.fill import fill
from relora_ds.zero.frozen_master import FrozenWeights
from relora_ds.zero.joint_norm import JointNorm
from relora_ds.zero.optimizers import make_optimizer
from relora_ds.zero.owner_updates import OwnerUpdates
from relora_ds.zero.randomness import drops_values_only
from relora_ds.zero.scheduler import ReLoRAScheduler
from relora_ds.zero.shards import ShardView
from relora_ds.zero.start import init_distributed
from relora_ds.zero.streams import order_gathers
from relora_ds.zero.switches import Switching
from relora_ds.zero.vectors import VectorAdamW
from relora_ds.zero.weights import Nothing, WeightSource, sources_of

logger = logging.getLogger(__name__)


class Islands(Protocol):
    """What makes an engine one of several islands: `relora_ds.Islands`."""

    def problems(self, relora: ReLoRAConfig | None) -> list[str]:
        """Return why engines could not exchange, one message each."""

    def join(self, engine: ReLoRAEngine) -> Any:
        """Return the exchanges of an engine."""


_ADAMW_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def initialize(
    model: nn.Module,
    config: str | dict,
    relora: ReLoRAConfig | None = None,
    *,
    lr: float | None = None,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.0,
    schedule: str = "cosine",
    decay_steps: int | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    optimizer: str | None = None,
    precision: str | None = None,
    micro_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    max_grad_norm: float | None = None,
    training_data=None,
    collate_fn=None,
    param_groups: list[dict] | None = None,
    seed: int = 0,
    after_step: Callable[[ReLoRAEngine], None] | None = None,
    weights: WeightSource | Nothing | None = None,
    islands: Islands | None = None,
    matrix_optimizer: MatrixOptimizer | Mapping[str, MatrixOptimizer] | None = None,
    matrix_lr: float | None = None,
    switching: SwitchLoRAConfig | None = None,
):
    """Make DeepSpeed's 4-tuple, as `deepspeed.initialize` does, for a model that `relora_ds.wrap` has wrapped.

    A plain model is trained at full rank.

    Args:
        model: on CPU, with its values or on the meta device without them (its buffers need theirs), or built under
            `deepspeed.zero.Init`. Masters of what trains and of what is frozen start from its values; best in fp32.
            Where ranks hold different values, rank 0's count. Its tensors are released one by one.
        config: a shipped name ("zero1"), a path, or a DeepSpeed config dict.
        relora: not needed: the model carries the config that it was wrapped with, as `model.relora_config`. With its
            `restart_every`, `engine.step()` restarts.
        lr, betas, eps, weight_decay: AdamW's. None = what `config["optimizer"]["params"]` says, else (0.9, 0.999),
            1e-8 and 0; `lr` has no default.
        optimizer: "adamw", or "adamw_8bit" for moments in 8 bit. None = what `config["optimizer"]["type"]` says
            ("AdamW", "AdamW8bit"), else "adamw".
        total_steps, warmup_steps, min_lr_ratio, schedule, decay_steps: the learning rate's curve, see
            `relora_ds.lr_multiplier`; steps are applied optimizer steps, counted from here.
        precision: "fp32", "bf16" or "fp16". None = what `config` enables, else bf16 on GPUs that have it, else fp32.
        micro_batch_size, gradient_accumulation_steps: None = what `config` says, else 1.
        max_grad_norm: gradient clipping, 0 = none. None = what `config` says, else 1.0.
        training_data, collate_fn: a dataset, and how its items make a batch, for the loader that is returned.
        param_groups: default `lowrank.wrap.parameter_groups(model)`: LoRA factors, other matrices, and
            vectors without weight decay. In groups of your own `lora_A` has no weight decay: that of `lora_B` acts on
            the product.
        seed: decides the values of A after each restart.
        after_step: called after every applied step; default: restart when it is due.
        weights: a source of the plain model's fp32 weights, read one tensor at a time, instead of the model's own
            values; `zero.weights.NOTHING` where a checkpoint is loaded next.
        matrix_optimizer: of the weights of a model that is wrapped with `trains="none"`, which their owners update
            from whole gradients (`relora_ds.matrix`); one for all, or one for each layer by its name.
        matrix_lr: its peak learning rate; None = `lr`.
        switching: switch rows of A and columns of B against candidates at every step (`relora_ds.SwitchLoRAConfig`),
            for which W is stored in fp32. A and B then begin with values of this method, and W with what is left.
        islands: train as one of several islands, which exchange their updates at restarts (`relora_ds.Islands`).

    Returns:
        `(engine, optimizer, loader, scheduler)`; `loader` is None without `training_data`.

    Raises:
        ValueError: everything in `config` that is not supported, or contradicts an argument that was passed, at once;
            `relora` is another config than the model's; a model without values and without a source of them, or a
            source of another model's, before anything is built; a tensor that cannot be read, on every rank.
    """
    relora = carried_config(model, relora)
    curve = ScheduleConfig(
        total_steps,
        warmup_steps,
        min_lr_ratio,
        relora.restart_every if relora else None,
        relora.restart_warmup_steps if relora else 0,
        schedule,
        decay_steps,
    )
    if (changed := align_tie_flag(model)) and int(os.environ.get("RANK", "0")) == 0:
        logger.warning(changed)
    settings = ds_config.load(config, ARGUMENT_NAMES["config"])
    passed: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    batch: dict[str, Any] = {"micro_batch_size": micro_batch_size, "accumulation": gradient_accumulation_steps}
    matrix_optimizers = by_layer(matrix_optimizer, model)
    decay = {**ds_adamw.values_in(settings), **given(passed)}.get("weight_decay", 0.0)
    _refuse(
        matrix_problems(matrix_optimizer, matrix_optimizers, matrix_lr, model, islands is not None)
        + argument_problems(passed, optimizer, settings)
        + switching_problems(
            switching,
            model,
            optimizer or ds_adamw.name_in(settings) or "adamw",
            decay,
            settings,
            islands is not None,
        )
        + rule_problems(matrix_optimizers, decay, model)
        + schedule_problems(curve)
        + (islands.problems(relora) if islands is not None else [])
        + (
            ds_config.problems(
                settings,
                precision=precision,
                max_grad_norm=max_grad_norm,
                optimizer=optimizer,
                **passed,
                **batch,
                names=ARGUMENT_NAMES,
            )
            or ds_types.problems(settings, ARGUMENT_NAMES["config"])
        )
    )
    init_distributed()
    precision = precision or ds_config.precision_of(settings) or ("bf16" if accelerator.computes_bf16() else "fp32")
    _refuse(
        accelerator.precision_problems(precision) + (storage_problems(relora, precision) if relora is not None else [])
    )
    optimizer = optimizer or ds_adamw.name_in(settings) or "adamw"
    adamw = {**_ADAMW_DEFAULTS, **ds_adamw.values_in(settings), **given(passed)}
    settings = resolve(
        settings,
        precision=precision,
        **batch,
        world_size=dist.get_world_size(),
        max_grad_norm=1.0 if max_grad_norm is None else max_grad_norm,
        num_trainable=sum(full_shape(p).numel() for p in model.parameters() if p.requires_grad),
        cpu=not accelerator.is_cuda(),
        names=ARGUMENT_NAMES,
    )
    stage = settings["zero_optimization"]["stage"]

    if switching is not None and relora is not None:
        _refuse(switching_partition_problems(model, relora, precision, stage, dist.get_world_size()))

    sources = sources_of(model, weights)
    device = accelerator.device_of_rank()
    frozen = FrozenWeights(owned_layers(model), relora, precision=precision, stage=stage, device=device)
    if relora is not None and frozen.layers and dist.get_rank() == 0:
        for warning in storage_warnings(relora, precision, stage):
            logger.warning(for_everyone(warning))
    allocate(model, settings, DTYPES[precision], device)

    groups = param_groups or parameter_groups(model, weight_decay=adamw["weight_decay"])
    reason = optimizers.partition_problem(optimizer, groups, settings["zero_optimization"], dist.get_world_size())
    _refuse([f"optimizer: {reason}"] if reason else [])
    inner = make_optimizer(
        optimizer, groups, model, by_vector=switching is not None, **{**adamw, "betas": tuple(adamw["betas"])}
    )
    decayed_group = optimizers.decayed_group(inner.param_groups, frozen.lowrank)
    _refuse(
        [f"param_groups: group {decayed_group} has lora_B and weight_decay, which does not go with switching; use 0"]
        if switching is not None and decayed_group is not None
        else []
    )
    indices = {id(p): i for i, group in enumerate(inner.param_groups) for p in group["params"]}
    group_of = {name: indices[id(p)] for name, p in model.named_parameters() if id(p) in indices}
    with nothing_broadcast():
        engine, stepped, loader, scheduler = deepspeed.initialize(
            model=model,
            optimizer=inner,
            config=settings,
            training_data=training_data,
            collate_fn=collate_fn,
            lr_scheduler=lambda inner: ReLoRAScheduler(inner, curve),
        )

    order_gathers(engine)
    shards = ShardView(engine, group_of)
    shards.create_adam_state()
    shards.drop_gathered_copies()
    fill(model, shards, frozen, sources, engine.device)

    engine.__class__ = ReLoRAEngine
    engine.shards, engine.frozen, engine.relora, engine.seed = shards, frozen, relora, seed
    engine.after_step = after_step or ReLoRAEngine.restart_if_due
    engine.drift_probe = None
    engine.last_restart = None
    engine.num_accumulated = 0
    engine.decayed_group = decayed_group
    if decayed_group is not None:
        frozen.set_decay(1.0)
    engine.exact_gradients = engine.residual = engine.exchange = engine.owner_steps = engine.switching = None
    engine.joint_norm = JointNorm()
    if matrix_optimizers:
        engine.joint_norm.install(engine.optimizer)
        engine.owner_steps = owner_steps_of(
            matrix_optimizers,
            frozen,
            shards,
            engine.joint_norm,
            lr=adamw["lr"] if matrix_lr is None else matrix_lr,
            weight_decay=adamw["weight_decay"],
            seed=seed,
        )
    if relora is not None and relora.residual_every is not None and frozen.layers:
        update = functools.partial(orthogonal_update, lr=relora.residual_lr)
        engine.residual = OwnerUpdates(frozen, shards, relora.residual_every, update, seed)
    if switching is not None:
        assert isinstance(inner, VectorAdamW)
        engine.switching = Switching(frozen, shards, inner, switching, seed=seed, total_steps=total_steps)
        engine.switching.begin()
    if islands is not None:
        engine.exchange = islands.join(engine)
    engine._checkpoints = EngineCheckpoints(engine)
    engine._masks_differ_on_cpu = drops_values_only(model)
    return engine, stepped, loader, scheduler


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))

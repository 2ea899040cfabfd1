"""What of a Hugging Face `Trainer` ReLoRA cannot train with, in the words of `TrainingArguments`."""

import os
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from relora_ds.config import ReLoRAConfig
from relora_ds.config.curve import Names
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.zero import ds_config, ds_types, optimizers

# Those of TrainingArguments.optim that are ours.
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
}
# What a Trainer's user calls the values that a DeepSpeed configuration may contradict.
NAMES = {
    name: f"TrainingArguments.{field}"
    for name, field in {
        "config": "deepspeed",
        "precision": "bf16",
        "micro_batch_size": "per_device_train_batch_size",
        "batch_size": "per_device_train_batch_size",
        "accumulation": "gradient_accumulation_steps",
        "max_grad_norm": "max_grad_norm",
        "optimizer": "optim",
        "lr": "learning_rate",
        "betas": "adam_beta1, adam_beta2",
        "eps": "adam_epsilon",
        "weight_decay": "weight_decay",
    }.items()
}
# So for what makes the curve.
CURVE_NAMES = Names(
    schedule="TrainingArguments.lr_scheduler_type",
    decay_steps="TrainingArguments.lr_scheduler_kwargs num_decay_steps",
    warmup_steps="TrainingArguments.warmup_steps",
)


def problems(trainer: Trainer, config: ReLoRAConfig | None = None) -> list[str]:
    """Return everything about `trainer` that ReLoRA cannot train with, one message each.

    Args:
        trainer: one that has not trained yet.
        config: the config that the caller thinks the model was wrapped with; None = the model's own.
    """
    if not trainer.is_deepspeed_enabled:
        return [
            'TrainingArguments.deepspeed: not set, and ReLoRA trains on DeepSpeed only; pass deepspeed="zero1.json", '
            "a file of the checkout's ds_configs/ (zero0.json is plain data parallelism)"
        ]
    return [
        *_model_problems(trainer, config),
        *_trainer_problems(trainer),
        *_argument_problems(trainer.args),
        *_deepspeed_problems(trainer),
    ]


def _model_problems(trainer: Trainer, config: ReLoRAConfig | None) -> list[str]:
    if hasattr(trainer, "relora_settings") or trainer.model_wrapped is not trainer.model:
        return ["trainer: it has a ReLoRACallback, or an engine, already; build a new Trainer"]
    carried = getattr(trainer.model, "relora_config", None)
    if carried is not None and carried.trains == "none":
        return [
            "model: it is wrapped with trains='none', for optimizers of whole matrices, which the Trainer has none of; "
            "wrap it with factors, or train it in a loop of your own, relora_ds.initialize(matrix_optimizer=...)"
        ]
    if carried is None or not lowrank_layers(trainer.model):
        return ["model: it has no low-rank layers; call relora_ds.wrap(model, config) before the Trainer"]
    if config is not None and config != carried:
        return [
            "config: another one than the model was wrapped with, which is model.relora_config; leave it out, or "
            "wrap a fresh model"
        ]
    return []


def _trainer_problems(trainer: Trainer) -> list[str]:
    found = []
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if (seen := trainer.accelerator.num_processes) != world_size:
        found.append(
            f"TrainingArguments: accelerate sees {seen} process(es) of {world_size}, so every rank would "
            "train on the same data; without GPUs set use_cpu=True"
        )
    if trainer.model_init is not None:
        found.append("model_init: not supported; pass a wrapped model=")
    if any(given is not None for given in (trainer.optimizer, trainer.lr_scheduler, trainer.optimizer_cls_and_kwargs)):
        found.append("optimizers: optimizer and learning rate must follow the restarts; leave them out")
    if trainer.accelerator.parallelism_config is not None:
        found.append("TrainingArguments.parallelism_config: only data parallelism (ZeRO) is supported; leave it out")
    return found


def _argument_problems(args: TrainingArguments) -> list[str]:
    found = []
    if args.optim not in OPTIMIZERS or args.optim_args:
        found.append(
            f"TrainingArguments.optim: {getattr(args.optim, 'value', args.optim)} {args.optim_args or ''} is not "
            f"supported; use {' or '.join(OPTIMIZERS)} without optim_args"
        )
    elif reason := optimizers.unavailable(OPTIMIZERS[args.optim]):
        found.append(f"TrainingArguments.optim: {reason}")
    for field in ("auto_find_batch_size", "torch_compile"):
        if getattr(args, field):
            found.append(f"TrainingArguments.{field}: True is not supported with ReLoRA; leave it out")
    try:
        curve_of(args)
    except ValueError as error:
        found.append(str(error))
    return found


def _deepspeed_problems(trainer: Trainer) -> list[str]:
    args, settings = trainer.args, trainer.accelerator.deepspeed_plugin.deepspeed_config
    return ds_config.problems(
        settings,
        micro_batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
        optimizer=OPTIMIZERS.get(args.optim),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        names=NAMES,
    ) or ds_types.problems(settings, NAMES["config"])


def curve_of(args: TrainingArguments) -> dict[str, Any]:
    """Return `schedule`, `min_lr_ratio` and `decay_steps` for `initialize`: transformers' curve, below the restarts.

    Raises:
        ValueError: `lr_scheduler_type` or its arguments make a curve that `relora_ds.lr_multiplier` does not have.
    """
    kind: str = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    kwargs: Any = args.lr_scheduler_kwargs or {}
    given = set(kwargs) if isinstance(kwargs, dict) else {kwargs}
    if kind in ("cosine", "linear") and not given:
        return _curve(kind)
    if kind == "constant_with_warmup" and not given:
        return _curve("constant")
    if kind == "constant" and not given:
        if args.warmup_steps:
            raise ValueError(
                f"TrainingArguments.lr_scheduler_type: constant has no warm-up, and warmup_steps is "
                f'{args.warmup_steps}; use "constant_with_warmup", or warmup_steps=0'
            )
        return _curve("constant")
    if kind == "cosine_with_min_lr" and given == {"min_lr_rate"}:
        return _curve("cosine", kwargs["min_lr_rate"])
    if kind == "cosine_with_min_lr" and given == {"min_lr"}:
        return _curve("cosine", kwargs["min_lr"] / args.learning_rate)
    if kind == "warmup_stable_decay" and _is_linear_decay(kwargs, given):
        return _curve("wsd", kwargs.get("min_lr_ratio", 0.0), kwargs["num_decay_steps"])
    raise ValueError(
        f"TrainingArguments.lr_scheduler_type: {kind} {kwargs or ''} is not supported below ReLoRA's restarts; use "
        '"linear", "cosine", "constant_with_warmup", "cosine_with_min_lr" with '
        'lr_scheduler_kwargs={"min_lr_rate": 0.1}, or "warmup_stable_decay" with lr_scheduler_kwargs='
        '{"num_decay_steps": 100, "decay_type": "linear"}'
    )


def _curve(schedule: str, min_lr_ratio: float = 0.0, decay_steps: int | None = None) -> dict[str, Any]:
    return {"schedule": schedule, "min_lr_ratio": min_lr_ratio, "decay_steps": decay_steps}


def _is_linear_decay(kwargs: dict[str, Any], given: set[str]) -> bool:
    """Return True for the arguments of a wsd that rises and falls linearly; its decay is a cosine by default."""
    return (
        {"num_decay_steps", "decay_type"} <= given <= {"num_decay_steps", "decay_type", "warmup_type", "min_lr_ratio"}
        and kwargs["decay_type"] == "linear"
        and kwargs.get("warmup_type", "linear") == "linear"
    )

"""`ReLoRACallback`: ReLoRA with the Hugging Face `Trainer`, on DeepSpeed ZeRO stages 0 to 3.

    relora_ds.wrap(model, config)
    trainer = Trainer(model=model, args=TrainingArguments(deepspeed="ds_configs/zero1.json", ...), ...)
    trainer.add_callback(ReLoRACallback(trainer, config))
    trainer.train()

A callback alone could not do it. It never sees the engine; by `on_train_begin` DeepSpeed has cast the weights, whose
fp32 values are needed as masters, and a checkpoint has been loaded. So the callback also specialises the classes of
this one trainer and of its accelerator (nothing is patched globally; a Trainer subclass keeps its own methods, because
ours come between it and `Trainer`). What transformers 5 and accelerate 1 call, and what happens there instead:

    Trainer.create_optimizer    a `DummyOptim`: accelerate's sign for "whoever makes the engine makes the optimizer"
    Accelerator.prepare         the engine comes from `relora_ds.initialize`: masters, AdamW, schedule, restarts
    Trainer.create_scheduler    the engine's own scheduler; the engine steps it, the Trainer's step() does nothing
    Trainer.train               a second one resumes in the same engine (the Trainer would destroy it, and then use it)
    Trainer.save_model          the merged plain model, from the fp32 masters

Everything else is the Trainer's: it calls the engine's `backward`, `step`, `save_checkpoint` and `load_checkpoint`, of
which the last three are `ReLoRAEngine`'s. `on_train_begin` checks that it is this engine that trains.
"""

import copy
import dataclasses
import os

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedEngineWrapper,
    DeepSpeedOptimizerWrapper,
    DeepSpeedSchedulerWrapper,
    DummyOptim,
    DummyScheduler,
)
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.schedule import lr_multiplier
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.zero import ds_config
from relora_ds.zero.engine import ReLoRAEngine
from relora_ds.zero.initialize import initialize
from relora_ds.zero.plain_model import plain_like

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


class ReLoRACallback(TrainerCallback):
    """Restarts, their learning rate, and checkpoints that keep the merges, in a `Trainer` that uses DeepSpeed.

    Add it before training: `trainer.add_callback(ReLoRACallback(trainer, config))`. Rates, steps and AdamW's values
    are those of the `TrainingArguments`. The curve is `relora_ds.lr_multiplier`: `lr_scheduler_type="cosine"`, or
    "cosine_with_min_lr" with `lr_scheduler_kwargs={"min_lr_rate": 0.1}`, and a ramp after every restart.

    `trainer.save_model(dir)` and the model files in every checkpoint are the merged plain model in fp32, for
    `AutoModelForCausalLM.from_pretrained`; `trainer.model` itself stays wrapped. Each restart is logged once:
    `restarts`, `prune_fraction_m`, `prune_fraction_v`, `merge_loss`, `restart_s` (see `RestartReport`).

    Args:
        trainer: its model wrapped with `relora_ds.wrap`, not trained yet.
        config: the one that the model was wrapped with.

    Raises:
        ValueError: everything about the trainer that ReLoRA cannot train with, at once.
    """

    def __init__(self, trainer: Trainer, config: ReLoRAConfig):
        if not isinstance(trainer, Trainer):
            raise ValueError(
                f"trainer: {type(trainer).__name__} is no Trainer; use "
                "trainer.add_callback(ReLoRACallback(trainer, config))"
            )
        found = problems(trainer, config)
        if found:
            raise ValueError("\n".join(found))
        self.trainer = trainer
        self._logged = None
        _specialise(trainer, _ReLoRATrainer, Trainer)
        _specialise(trainer.accelerator, _ReLoRAAccelerator, Accelerator)
        trainer.relora = config
        # A copy from before the Trainer fills in bucket sizes by a rule of its own.
        trainer.relora_settings = copy.deepcopy(trainer.accelerator.deepspeed_plugin.deepspeed_config)
        trainer.accelerator.relora_prepare = trainer.relora_prepare

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, wrapper = self.trainer, self.trainer.accelerator.deepspeed_engine_wrapped
        if not (
            isinstance(trainer.model_wrapped, ReLoRAEngine)
            and wrapper is not None
            and wrapper.engine is trainer.model_wrapped
            and isinstance(trainer.lr_scheduler, _Schedule)
        ):
            raise RuntimeError(
                "ReLoRACallback: the Trainer trains with something else than the engine made for it; transformers "
                f"{transformers.__version__} or accelerate {accelerate.__version__} differs from the versions that "
                "relora_ds supports, or a subclass overrides create_scheduler without calling the Trainer's"
            )
        self._logged = wrapper.engine.last_restart

    def on_step_end(self, args, state, control, **kwargs):
        report = self.trainer.model_wrapped.last_restart
        if report is self._logged:
            return
        self._logged = report
        should_log = control.should_log
        self.trainer.log(
            {
                "restarts": report.restarts,
                "prune_fraction_m": report.prune_fraction_m,
                "prune_fraction_v": report.prune_fraction_v,
                "merge_loss": report.merge_loss,
                "restart_s": report.restart_s,
            }
        )
        control.should_log = should_log  # log() clears it, and the step's loss would go unlogged


def problems(trainer: Trainer, config: ReLoRAConfig) -> list[str]:
    """Everything about `trainer` that ReLoRA cannot train with, one message each."""
    if not trainer.is_deepspeed_enabled:
        return [
            "TrainingArguments.deepspeed: not set, and ReLoRACallback trains on DeepSpeed only; pass "
            'deepspeed="ds_configs/zero1.json" (zero0.json is plain data parallelism)'
        ]
    args, model = trainer.args, trainer.model
    found = list(config.problems())
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if (seen := trainer.accelerator.num_processes) != world_size:
        found.append(
            f"TrainingArguments: accelerate sees {seen} process(es) of {world_size}, so every rank would "
            "train on the same data; without GPUs set use_cpu=True"
        )
    if isinstance(trainer, _ReLoRATrainer) or trainer.model_wrapped is not model:
        found.append("trainer: it has a ReLoRACallback, or an engine, already; build a new Trainer")
    elif not lowrank_layers(model):
        found.append("model: it has no low-rank layers; call relora_ds.wrap(model, config) before the Trainer")
    if trainer.model_init is not None:
        found.append("model_init: not available; pass a wrapped model=")
    if any(given is not None for given in (trainer.optimizer, trainer.lr_scheduler, trainer.optimizer_cls_and_kwargs)):
        found.append("optimizers: optimizer and learning rate must follow the restarts; leave them out")
    if args.optim not in OPTIMIZERS or args.optim_args:
        found.append(
            f"TrainingArguments.optim: {args.optim.value} {args.optim_args or ''} is not available; use "
            f"{' or '.join(OPTIMIZERS)} without optim_args"
        )
    for field in ("auto_find_batch_size", "torch_compile"):
        if getattr(args, field):
            found.append(f"TrainingArguments.{field}: True is not available with ReLoRACallback; leave it out")
    if trainer.accelerator.parallelism_config is not None:
        found.append("TrainingArguments.parallelism_config: only data parallelism (ZeRO) is available; leave it out")
    try:
        min_lr_ratio(args)
    except ValueError as error:
        found.append(str(error))
    return found + ds_config.problems(trainer.accelerator.deepspeed_plugin.deepspeed_config)


def min_lr_ratio(args: TrainingArguments) -> float:
    """Where the cosine ends, as a part of the learning rate.

    Raises:
        ValueError: `lr_scheduler_type` is no cosine (the Trainer's default is not), or has other arguments.
    """
    kind, kwargs = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    if kind == "cosine" and not kwargs:
        return 0.0
    if kind == "cosine_with_min_lr" and set(kwargs) == {"min_lr_rate"}:
        return kwargs["min_lr_rate"]
    if kind == "cosine_with_min_lr" and set(kwargs) == {"min_lr"}:
        return kwargs["min_lr"] / args.learning_rate
    raise ValueError(
        f"TrainingArguments.lr_scheduler_type: {kind} {kwargs or ''} is not available, ReLoRA restarts a "
        'cosine; use "cosine", or "cosine_with_min_lr" with lr_scheduler_kwargs={"min_lr_rate": 0.1}'
    )


class _ReLoRATrainer(Trainer):
    """What a trainer's class is specialised with. `relora` and `relora_settings` are set by the callback."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if not any(isinstance(callback, ReLoRACallback) for callback in self.callback_handler.callbacks):
            raise ValueError("ReLoRACallback: made, but not added; use trainer.add_callback(ReLoRACallback(...))")
        if isinstance(self.model_wrapped, ReLoRAEngine):
            if not resume_from_checkpoint:
                raise ValueError(
                    "train: this Trainer has trained already; pass resume_from_checkpoint, or build a new "
                    "Trainer with what save_model wrote"
                )
            self.accelerator.deepspeed_engine_wrapped = None  # else it is destroyed, and then used nevertheless
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = DummyOptim(params=[])
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        self.lr_scheduler = _Schedule(engine.lr_scheduler, self.optimizer)
        return self.lr_scheduler

    def relora_prepare(self, *objects):
        """`Accelerator.prepare` of the model and its optimizer: the same objects, with the engine behind them."""
        if not any(isinstance(item, DummyOptim) for item in objects):
            raise ValueError(
                "ReLoRACallback: evaluation before train() (use eval_on_start=True), or an optimizer of a "
                "Trainer subclass; neither is available, the engine is made by train()"
            )
        if isinstance(self.model_wrapped, ReLoRAEngine):
            engine = self.model_wrapped  # a resume in the same process, perhaps with other max_steps
            engine.lr_scheduler.config = dataclasses.replace(engine.lr_scheduler.config, **self._schedule())
        else:
            engine = self._make_engine()
        optimizer = DeepSpeedOptimizerWrapper(engine.optimizer)
        accelerator = self.accelerator
        accelerator.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(engine)
        accelerator.deepspeed_config = engine.config
        accelerator._models.append(engine)
        accelerator._optimizers.append(optimizer)
        prepared = tuple(
            engine if isinstance(item, nn.Module) else optimizer if isinstance(item, DummyOptim) else item
            for item in objects
        )
        return prepared if len(prepared) > 1 else prepared[0]

    def _make_engine(self) -> ReLoRAEngine:
        args = self.args
        precision = ds_config.precision_of(self.accelerator.deepspeed_plugin.deepspeed_config) or "fp32"
        return initialize(
            model=self.model,
            config=self.relora_settings,
            relora=self.relora,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            precision=precision,
            micro_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            seed=args.seed,
            **self._schedule(),
        )[0]

    def _schedule(self) -> dict:
        total_steps = self.state.max_steps
        return {
            "total_steps": total_steps,
            "warmup_steps": self.args.get_warmup_steps(total_steps),
            "min_lr_ratio": min_lr_ratio(self.args),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the merged plain model in fp32, and what the Trainer writes beside it. Collective: on all ranks."""
        engine = self.model_wrapped
        if not isinstance(engine, ReLoRAEngine):
            raise ValueError("save_model: nothing has been trained yet; call it after train()")
        state = engine.collect_merged(dst=None if self.args.save_on_each_node else 0)
        if self.args.should_save:
            wrapped, self.model = self.model, plain_like(self.model, state)
            try:
                self._save(output_dir)
            finally:
                self.model = wrapped
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


class _ReLoRAAccelerator(Accelerator):
    """What the trainer's accelerator is specialised with. `relora_prepare` is set by the callback."""

    def prepare(self, *objects, **kwargs):
        if any(isinstance(item, (nn.Module, torch.optim.Optimizer, DummyOptim, DummyScheduler)) for item in objects):
            return self.relora_prepare(*objects)
        return super().prepare(*objects, **kwargs)  # data loaders


class _Schedule(DeepSpeedSchedulerWrapper):
    """The engine's scheduler as the Trainer sees it: the engine steps it, after every applied step."""

    def get_last_lr(self) -> list[float]:
        # The Trainer logs it after the step. By then DeepSpeed's scheduler has gone on to the next step's rate.
        schedule = self.scheduler
        used = lr_multiplier(max(0, schedule.t - 1), **dataclasses.asdict(schedule.config), restarts=schedule.restarts)
        return [base * used for base in schedule.base_lrs]


def _specialise(instance, specialised: type, base: type) -> None:
    """Give `instance` the methods of `specialised`, a subclass of `base`, below those of its own class."""
    own = type(instance)
    instance.__class__ = specialised if own is base else type(f"ReLoRA{own.__name__}", (own, specialised), {})

"""How a Hugging Face `Trainer` trains with ReLoRA: what `ReLoRATrainer` and `ReLoRACallback` have in common.

A callback alone could not do it. It never sees the engine; by `on_train_begin` DeepSpeed has cast the weights, whose
fp32 values are needed as masters, and a checkpoint has been loaded. What transformers 5 and accelerate 1 call, and what
happens there instead:

    Trainer.create_optimizer    a `DummyOptim`: accelerate's sign for "the optimizer is made with the engine"
    accelerator.prepare         the engine comes from `relora_ds.initialize`: masters, AdamW, schedule, restarts
    Trainer.create_scheduler    the engine's own scheduler; the engine steps it, the Trainer's step() does nothing
    Trainer.train               a second one resumes in the same engine (the Trainer would destroy it, and then use it)
    Trainer.save_model          the merged plain model, from the fp32 masters
    TrainerState.global_step    of an island, the engine's step (`hf_islands`)

Everything else is the Trainer's: it calls the engine's `backward`, `step`, `save_checkpoint` and `load_checkpoint`, of
which the last three are `ReLoRAEngine`'s. `RestartLog.on_train_begin` checks that it is this engine that trains.
"""

import copy
import dataclasses
from typing import Any, cast

import accelerate
import torch
import transformers
from accelerate.utils import (
    DeepSpeedEngineWrapper,
    DeepSpeedOptimizerWrapper,
    DeepSpeedSchedulerWrapper,
    DummyOptim,
    DummyScheduler,
)
from torch import nn
from transformers import Trainer, TrainerCallback

from relora_ds.config.curve import ScheduleConfig
from relora_ds.exchange.island import Islands
from relora_ds.interop.hf_checks import CURVE_NAMES, OPTIMIZERS, curve_of
from relora_ds.interop.hf_islands import IslandTraining, NothingLeftError, StepsOfIsland
from relora_ds.lowrank.schedule import lr_multiplier
from relora_ds.zero import ds_config
from relora_ds.zero.engine import ReLoRAEngine
from relora_ds.zero.initialize import initialize
from relora_ds.zero.plain_model import plain_like
from relora_ds.zero.restart import RestartReport


class ReLoRATraining(IslandTraining):
    """A `Trainer` whose engine is ours, from `begin` on.

    Attributes:
        relora_settings: the DeepSpeed configuration that the engine is made from.
    """

    relora_settings: dict[str, Any]

    def begin(self, islands: Islands | None) -> None:
        """Take over from the Trainer; once, before it trains."""
        self.islands = islands
        # A copy from before the Trainer fills in bucket sizes by a rule of its own.
        self.relora_settings = copy.deepcopy(self.accelerator.deepspeed_plugin.deepspeed_config)
        self.accelerator.prepare = self._prepare

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as the Trainer does; a second call must resume, which it does in the same engine."""
        if not any(isinstance(callback, RestartLog) for callback in self.callback_handler.callbacks):
            raise ValueError("ReLoRACallback: made, but not added; use trainer.add_callback(ReLoRACallback(trainer))")
        if isinstance(self.model_wrapped, ReLoRAEngine):
            if self.islands is not None:
                raise ValueError(
                    "train: this Trainer has trained already, and its island has left the others; start the script "
                    "again, with resume_from_checkpoint"
                )
            if not resume_from_checkpoint:
                raise ValueError(
                    "train: this Trainer has trained already; pass resume_from_checkpoint, or build a new "
                    "Trainer with what save_model wrote"
                )
            self.accelerator.deepspeed_engine_wrapped = None  # else it is destroyed, and then used nevertheless
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except NothingLeftError:
            return self.end_without_a_step()
        finally:
            if self.islands is not None:
                self.islands.close()

    def create_optimizer(self, model=None):
        """Leave the optimizer to the engine."""
        if self.optimizer is None:
            self.optimizer = DummyOptim(params=[])
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Show the Trainer the engine's scheduler."""
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        self.lr_scheduler = Schedule(engine.lr_scheduler, self.optimizer)
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the merged plain model in fp32, and what the Trainer writes beside it. Collective: on all ranks."""
        engine = self.model_wrapped
        if not isinstance(engine, ReLoRAEngine):
            raise ValueError("save_model: nothing has been trained yet; call it after train()")
        state = engine.collect_merged(dst=None if self.args.save_on_each_node else 0)
        if self.args.should_save:
            wrapped, self.model = self.model, plain_like(engine.module, state)
            try:
                self._save(output_dir)
            finally:
                self.model = wrapped
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _prepare(self, *objects, **kwargs):
        """Do as `Accelerator.prepare` does; of a model and its optimizer return ours, with the engine behind them."""
        accelerator = self.accelerator
        if not any(
            isinstance(item, nn.Module | torch.optim.Optimizer | DummyOptim | DummyScheduler) for item in objects
        ):
            return type(accelerator).prepare(accelerator, *objects, **kwargs)  # data loaders
        if not any(isinstance(item, DummyOptim) for item in objects):
            raise ValueError(
                "trainer: evaluation before train() (use eval_on_start=True), or an optimizer of a "
                "Trainer subclass; neither is supported, the engine is made by train()"
            )
        if isinstance(self.model_wrapped, ReLoRAEngine):
            engine = self.model_wrapped  # a resume in the same process, perhaps with other max_steps
            engine.lr_scheduler.config = dataclasses.replace(engine.lr_scheduler.config, **self._schedule())
        else:
            engine = self._make_engine()
        optimizer = DeepSpeedOptimizerWrapper(engine.optimizer)
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
            model=self.model_wrapped,
            config=self.relora_settings,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            optimizer=OPTIMIZERS[args.optim],
            precision=precision,
            micro_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            seed=args.seed,
            islands=self.islands,
            **self._schedule(),
        )[0]

    def _schedule(self) -> dict[str, Any]:
        """Return the arguments of `initialize` that make the curve. ValueError where a ramp would meet the decay."""
        total_steps, relora = self.state.max_steps, cast(Any, self.model).relora_config
        curve = {
            "total_steps": total_steps,
            "warmup_steps": self.args.get_warmup_steps(total_steps),
            **curve_of(self.args),
        }
        whole = ScheduleConfig(
            **curve, restart_every=relora.restart_every, restart_warmup_steps=relora.restart_warmup_steps
        )
        if found := whole.problem(CURVE_NAMES):
            raise ValueError(found)
        return curve


class RestartLog(TrainerCallback):
    """Log each restart once: `restarts`, `prune_fraction_m`, `prune_fraction_v`, `merge_loss`, `restart_s`.

    Of an island each exchange: `exchanges`, `exchange_islands`, `exchange_bytes_sent`, `exchange_s`.

    Args:
        trainer: one whose class is `ReLoRATraining`, or will be.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._logged: RestartReport | None = None
        self._island: StepsOfIsland | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Check that the Trainer trains with our engine."""
        trainer, wrapper = self.trainer, self.trainer.accelerator.deepspeed_engine_wrapped
        if not (
            isinstance(trainer.model_wrapped, ReLoRAEngine)
            and wrapper is not None
            and wrapper.engine is trainer.model_wrapped
            and isinstance(trainer.lr_scheduler, Schedule)
        ):
            raise RuntimeError(
                "ReLoRA: the Trainer trains with something else than the engine made for it; transformers "
                f"{transformers.__version__} or accelerate {accelerate.__version__} differs from the versions that "
                "relora_ds supports, or a subclass overrides create_scheduler without calling the Trainer's"
            )
        if wrapper.engine.exchange is not None:
            self._island = StepsOfIsland(trainer)
            self._island.begin(args, state, control)
        self._logged = wrapper.engine.last_restart

    def on_train_end(self, args, state, control, **kwargs):
        """Warn where an island has not made its last exchange."""
        if self._island is not None:
            self._island.end()

    def on_step_end(self, args, state, control, **kwargs):
        """Log the exchange and the restart of this step, if there were any."""
        if self._island is not None:
            self._island.after_step(args, state, control)
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


class Schedule(DeepSpeedSchedulerWrapper):
    """The engine's scheduler as the Trainer sees it: the engine steps it, after every applied step."""

    def get_last_lr(self) -> list[float]:
        """Return the rates of the step that was taken last."""
        # The Trainer logs it after the step. By then DeepSpeed's scheduler has gone on to the next step's rate.
        schedule = self.scheduler
        used = lr_multiplier(max(0, schedule.t - 1), **dataclasses.asdict(schedule.config), restarts=schedule.restarts)
        return [base * used for base in schedule.base_lrs]

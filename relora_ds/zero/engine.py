"""`ReLoRAEngine`: DeepSpeed's engine with the restart inside `engine.step()`; `zero.initialize` makes one."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor

from relora_ds.zero.attention_mask import skip_search
from relora_ds.zero.collect import collect_merged
from relora_ds.zero.exact_gradients import ExactGradients
from relora_ds.zero.joint_norm import JointNorm, clip_coefficient
from relora_ds.zero.owner_steps import OwnerSteps
from relora_ds.zero.owner_updates import OwnerUpdates
from relora_ds.zero.plain_model import save_plain
from relora_ds.zero.randomness import seeded_forward
from relora_ds.zero.restart import RestartReport, restart
from relora_ds.zero.step_checks import gradients_are_finite, skip_step, warn_of_untrained
from relora_ds.zero.subspaces import watch_gradients
from relora_ds.zero.switches import Switching
from relora_ds.zero.together import together


def _to(value, device: torch.device):
    return value.to(device) if isinstance(value, Tensor) else value


class ReLoRAEngine(DeepSpeedEngine):
    """DeepSpeed's engine, specialised by `initialize`; never constructed directly.

    Attributes:
        shards: `ShardView` of what trains.
        frozen: `FrozenWeights`: owners and fp32 masters of what is frozen.
        relora: the `ReLoRAConfig`, or None.
        drift_probe: set it to a callable that returns logits of a fixed batch, and every restart measures
            by how much the function changed.
        last_restart: the `RestartReport` of the newest restart, or None.
        decayed_group: the index of the parameter group of `lora_B` where that has weight decay, which acts on W then.
        num_accumulated: backward passes since the last step at an accumulation boundary.
        exchange: with other islands, `exchange.exchange.Exchange`; None: there are none.
        residual: `OwnerUpdates` by what a one-sided chain leaves out, with `residual_every`; else None.
        switching: `Switching` of rows of A and columns of B; else None.
        owner_steps: `OwnerSteps` of a model without factors, whose weights their owners update; else None.
        exact_gradients: what a step before a scheduled restart takes along, with `gradient_estimate: exact`.
    """

    exact_gradients: ExactGradients | None
    exchange: Any
    owner_steps: OwnerSteps | None
    residual: OwnerUpdates | None
    switching: Switching | None
    joint_norm: JointNorm
    decayed_group: int | None

    @property
    def t(self) -> int:
        """Applied optimizer steps since this engine was made (a skipped step does not count)."""
        return self.lr_scheduler.t

    @property
    def restarts(self) -> list[int]:
        """The steps `t` after which restarts took place."""
        return self.lr_scheduler.restarts

    @skip_search
    def forward(self, *inputs, **kwargs):
        # A DataLoader's batches are on the host; DeepSpeed does not move them.
        inputs = [_to(value, self.device) for value in inputs]
        kwargs = {name: _to(value, self.device) for name, value in kwargs.items()}
        # ZeRO-3's list of the modules that it is inside of. Those that activation checkpointing repeats are left by an
        # exception, as soon as backward has what it needs, and would stay in it for good.
        FWD_MODULE_STACK.clear()
        if not self.training:
            return super().forward(*inputs, **kwargs)
        if self.exchange is not None:
            self.exchange.begin()
        if self.relora is not None and self.relora.restart_init == "gradient" and not self.num_accumulated:
            watch_gradients(self, self.lr_scheduler.is_scheduled(self.t + 1))
        with seeded_forward(
            f"{self._own_seed or self.seed}/{self.t}/{self.num_accumulated}",
            dist.get_rank(),
            self.device,
            differs_on_cpu=self._masks_differ_on_cpu,
        ):
            return super().forward(*inputs, **kwargs)

    def step(self, lr_kwargs=None):
        """DeepSpeed's step; after an applied one, the method's hook (ReLoRA: a restart when it is due)."""
        if at_boundary := self.is_gradient_accumulation_boundary():
            self.num_accumulated = 0
        left = self._left_by_decay()  # from here on, the learning rate is the next step's
        if at_boundary and self.owner_steps is not None:
            self.owner_steps.gather(self._loss_scale())
        super().step(lr_kwargs)
        if self.was_step_applied():
            if self.owner_steps is not None:
                self._step_owners(self.owner_steps)
            if self.frozen.decay is not None:
                self.frozen.decay.mul_(left)
            if self.t == 1:
                warn_of_untrained(self)
            if self.residual is not None:
                self.residual.after_step(self.t, self.lr_scheduler.last_multiplier)
            if self.switching is not None:
                self.switching.after_step(self.t)
            if self.exchange is not None:
                self.exchange.after_step()
            self.after_step(self)
        elif at_boundary and self.residual is not None:
            self.residual.drop()  # it has gradients that are not finite, on some rank
        elif at_boundary and self.owner_steps is not None:
            self.owner_steps.drop()

    def _loss_scale(self) -> float:
        return float(self.optimizer.loss_scale) if self.fp16_enabled() else 1.0

    def _step_owners(self, owners: OwnerSteps) -> None:
        norm = self.joint_norm.reported(self.get_global_grad_norm())
        self._global_grad_norm = norm
        owners.apply(self.t, self.lr_scheduler.last_multiplier, clip_coefficient(norm, self.gradient_clipping()))

    def clip_fp32_gradients(self):
        """At stage 0 in fp32; the other stages clip in their optimizers."""
        if self.owner_steps is None:
            super().clip_fp32_gradients()
            return
        norm = self.joint_norm.of(self._global_grad_norm)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, clip_coefficient(norm, self.gradient_clipping()))

    @property
    def owned_state(self) -> OwnerSteps | Switching | None:
        """What has state by layer, on the owner of each, that checkpoints save."""
        return self.switching if self.owner_steps is None else self.owner_steps

    @property
    def _own_seed(self) -> str | None:
        """What decides what islands have each for itself, A and masks of dropout; None where there are no islands."""
        return None if self.exchange is None else f"{self.seed}/{self.exchange.island}"

    def _left_by_decay(self) -> float:
        """Return what the next step's decoupled weight decay leaves of W, as of B: `1 - lr·weight_decay`."""
        if self.decayed_group is None:
            return 1.0
        group = self.lr_scheduler.optimizer.param_groups[self.decayed_group]
        return 1 - group["lr"] * group["weight_decay"]

    def _backward_prologue(self):
        super()._backward_prologue()
        if self.owner_steps is not None:
            self.owner_steps.begin_backward(is_last=self.is_gradient_accumulation_boundary())

    def _backward_epilogue(self):
        # Our own count: DeepSpeed's micro_steps is not restored by a load, and counts calls of step(), which a loop
        # that sets the accumulation boundary itself (accelerate's) makes at the boundary only.
        super()._backward_epilogue()
        self.num_accumulated += 1
        if self.exact_gradients is not None:
            self.exact_gradients.finish_backward()

    def restart_if_due(self) -> None:
        """Restart if the schedule wants one at this `t`."""
        if self.lr_scheduler.restart_due:
            self.restart()

    def restart(self) -> RestartReport:
        """Merge, reinitialise, prune, agree (see `zero.restart`), now. Collective.

        By hand it may be called between `step()` and the next forward; it is recorded, and the
        learning-rate ramp starts at this step.

        Raises:
            NonFiniteMergeError: the merged weights would not be finite; nothing was changed.
        """
        if not self.frozen.lowrank:
            raise ValueError("restart: the model has no low-rank layer with a base weight to merge into")
        if self.switching is not None:
            raise ValueError("restart: vectors of A and B are switched one by one here, and nothing restarts")
        if self.num_accumulated:
            raise ValueError(
                "restart: gradients of the old A and B are being accumulated; call it after the step() "
                "that applies them"
            )
        if self.t in self.restarts:
            raise ValueError(f"restart: there was one at step t={self.t} already; take a step first")
        if self.exchange is not None and not self.exchange.takes_place:
            raise ValueError("restart: an island restarts together with the others; leave it to step()")
        if self.residual is not None and self.t:
            self.residual.apply(self.lr_scheduler.last_multiplier)  # by hand, a period may end early
        self.last_restart = restart(
            self.shards,
            self.frozen,
            self.relora,
            t=self.t,
            number=len(self.restarts) + 1,
            seed=self.seed,
            device=self.device,
            probe=self._probe() if self.exchange is None else None,  # what others have learned is no drift
            exact=self.exact_gradients,
            exchange=self.exchange,
            own_seed=self._own_seed,
        )
        self.exact_gradients = None
        self.lr_scheduler.record_restart()
        return self.last_restart

    def collect_merged(self, dst: int | None = None) -> dict[str, Tensor]:
        """Return the merged model's weights in fp32, from the masters; see `zero.collect`. Collective."""
        return collect_merged(self.module, self.shards, self.frozen, device=self.device, dst=dst)

    def save_merged(self, directory: str, dtype: torch.dtype = torch.float32) -> None:
        """Write a plain transformers model (safetensors, no trace of the low-rank layers). Collective."""
        if not hasattr(self.module, "save_pretrained"):
            raise ValueError(
                f"save_merged: {type(self.module).__name__} is no transformers model (no save_pretrained)"
                "; use collect_merged() and save the tensors yourself"
            )
        state = self.collect_merged(dst=0)

        def write() -> None:
            if dist.get_rank() == 0:
                save_plain(self.module, state, directory, dtype)

        together(f"save_merged: {directory}", write)

    def save_checkpoint(
        self,
        save_dir,
        tag=None,
        client_state=None,
        save_latest=True,
        exclude_frozen_parameters=False,
        *,
        background=False,
    ):
        """Write `save_dir/tag`, as DeepSpeed's does, in the format of docs/concepts/checkpoints.md. Collective.

        It is atomic, and can be loaded on any number of ranks, at any ZeRO stage, in any precision and frozen format.
        Return True, as DeepSpeed does.

        Args:
            tag: default `global_step` with the number of steps. An earlier checkpoint of that name is replaced.
            client_state: a dict of what the loop needs besides: JSON values, tuples and tensors. Rank 0's is saved.
            save_latest: have the file `latest` name it.
            background: return when the state is copied; call `wait_for_checkpoint()` before the process ends.

        Raises:
            ValueError: an argument cannot be used; says what to do.
            OSError: on every rank, where one of them could not write; what was there before stays. Of a checkpoint in
                the background: at the next save, load or wait.
        """
        if exclude_frozen_parameters:
            raise ValueError(
                "exclude_frozen_parameters: True would lose every merge: they are in the frozen weights; leave it False"
            )
        self._checkpoints.save(save_dir, tag, client_state or {}, save_latest, background)
        return True

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint that is written in the background is complete. Errors: see `save_checkpoint`."""
        self._checkpoints.wait()

    def load_checkpoint(
        self,
        load_dir,
        tag=None,
        load_module_strict=True,
        load_optimizer_states=True,
        load_lr_scheduler_states=True,
        load_module_only=False,
        custom_load_fn=None,
    ):
        """Resume from what `save_checkpoint`, or a run, has written: also on other ranks, at another stage. Collective.

        Every file is compared with its sha256 before anything is overwritten.

        Args:
            tag: default: the checkpoint that `latest` names or, where that is damaged, the newest intact one.
            load_module_strict: has no effect: the checkpoint must be of the same network.
            load_optimizer_states: with Adam's moments.
            load_lr_scheduler_states: with the number of steps and the restarts so far.
            load_module_only: with neither.

        Returns:
            `(path, client_state)`; `(None, {})` where `load_dir` has no checkpoint.

        Raises:
            ValueError: on every rank and before anything is overwritten: the checkpoint is damaged, of another network,
                or of a format that is not read; or gradients are being accumulated.
        """
        if custom_load_fn is not None:
            raise ValueError("custom_load_fn: is not supported; load the checkpoint, then change engine.module")
        whole = not load_module_only
        return self._checkpoints.load(
            load_dir, tag, optimizer=whole and load_optimizer_states, schedule=whole and load_lr_scheduler_states
        )

    def destroy(self):
        """Release what the engine holds, after the checkpoint that is being written."""
        if "_checkpoints" in self.__dict__:
            self._checkpoints.close()
        super().destroy()

    def _take_model_step(self, lr_kwargs):
        # DeepSpeed skips a non-finite step on all ranks, except at stage 0 in fp32, where it applies the NaN.
        if isinstance(self.optimizer, torch.optim.Optimizer) and not (
            gradients_are_finite(self) and math.isfinite(self.joint_norm.owners)
        ):
            skip_step(self)
        else:
            super()._take_model_step(lr_kwargs)

    def _probe(self) -> Callable[[], Tensor] | None:
        if self.drift_probe is None:
            return None

        def logits() -> Tensor:
            training = self.module.training
            self.module.eval()
            try:
                return self.drift_probe()
            finally:
                self.module.train(training)

        return logits

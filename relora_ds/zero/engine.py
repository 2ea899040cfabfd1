"""`ReLoRAEngine`: DeepSpeed's engine with the restart inside `engine.step()`; `zero.initialize` makes one."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor

from relora_ds.checkpoint.latest import newest_tag
from relora_ds.lowrank.reinit import GradientSketch
from relora_ds.lowrank.storage import Storage
from relora_ds.lowrank.targets import summary
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.zero import checkpoint_files, checkpoint_model, universal
from relora_ds.zero.attention_mask import skip_search
from relora_ds.zero.collect import collect_merged
from relora_ds.zero.frozen_master import is_partitioned
from relora_ds.zero.plain_model import save_plain
from relora_ds.zero.randomness import seeded_forward
from relora_ds.zero.restart import RestartReport, restart
from relora_ds.zero.together import together

logger = logging.getLogger(__name__)


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
        num_accumulated: backward passes since the last step at an accumulation boundary.
    """

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
        if self.relora is not None and self.relora.restart_init == "gradient":
            self._sketch_gradients()
        with seeded_forward(
            f"{self.seed}/{self.t}/{self.num_accumulated}",
            dist.get_rank(),
            self.device,
            differs_on_cpu=self._masks_differ_on_cpu,
        ):
            return super().forward(*inputs, **kwargs)

    def _sketch_gradients(self) -> None:
        """Have the layers take W's gradient along in a step that a scheduled restart follows (`lowrank.reinit`)."""
        if self.num_accumulated:
            return
        due = self.lr_scheduler.is_scheduled(self.t + 1)
        for name, layer in self.frozen.layers.items():
            layer.sketch = (
                GradientSketch(layer.r, layer.in_features, f"{self.seed}/{self.t}/{name}/sketch", self.device)
                if due
                else None
            )

    def step(self, lr_kwargs=None):
        """DeepSpeed's step; after an applied one, the method's hook (ReLoRA: a restart when it is due)."""
        if self.is_gradient_accumulation_boundary():
            self.num_accumulated = 0
        super().step(lr_kwargs)
        if self.was_step_applied():
            if self.t == 1:
                self._warn_of_untrained()
            self.after_step(self)

    def _warn_of_untrained(self) -> None:
        """Name the low-rank layers whose B has no moment after the first step: nothing called them.

        Experts may not have had a token yet. A rank looks at its own shards only, which needs no communication.
        """
        shards = {name: self.shards[f"{name}.lora_B"] for name in lowrank_layers(self.module) if "expert" not in name}
        untrained = [name for name, shard in shards.items() if shard.exp_avg.numel() and not shard.exp_avg.any()]
        if untrained:
            logger.warning(
                "no gradient reached the low-rank update of %s in the first step: it is not called, or its "
                "result is not used; leave it out with exclude_modules",
                summary(untrained),
            )

    def _backward_epilogue(self):
        # Our own count: DeepSpeed's micro_steps is not restored by a load, and counts calls of step(), which a loop
        # that sets the accumulation boundary itself (accelerate's) makes at the boundary only.
        super()._backward_epilogue()
        self.num_accumulated += 1

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
        if not self.frozen.layers:
            raise ValueError("restart: the model has no low-rank layer with a base weight to merge into")
        if self.num_accumulated:
            raise ValueError(
                "restart: gradients of the old A and B are being accumulated; call it after the step() "
                "that applies them"
            )
        if self.t in self.restarts:
            raise ValueError(f"restart: there was one at step t={self.t} already; take a step first")
        self.last_restart = restart(
            self.shards,
            self.frozen,
            self.relora,
            t=self.t,
            number=len(self.restarts) + 1,
            seed=self.seed,
            device=self.device,
            probe=self._probe(),
        )
        self.lr_scheduler.record_restart()
        return self.last_restart

    def collect_merged(self, dst: int | None = None) -> dict[str, Tensor]:
        """The merged model's weights in fp32, from the masters; see `zero.collect`. Collective."""
        return collect_merged(self.module, self.shards, self.frozen, device=self.device, dst=dst)

    def save_merged(self, directory: str, dtype: torch.dtype = torch.float32) -> None:
        """Write a plain transformers model (safetensors, no trace of the low-rank layers). Collective."""
        if not hasattr(self.module, "save_pretrained"):
            raise ValueError(
                f"save_merged: {type(self.module).__name__} is no transformers model (no save_pretrained)"
                "; use collect_merged() and save the tensors yourself"
            )
        state, failure = self.collect_merged(dst=0), [None]
        if dist.get_rank() == 0:
            try:
                save_plain(self.module, state, directory, dtype)
            except Exception as error:  # the other ranks wait for word
                failure = [f"save_merged: rank 0 could not write {directory}: {error}"]
        dist.broadcast_object_list(failure, 0)
        if failure[0] is not None:
            raise OSError(failure[0])

    def save_checkpoint(self, save_dir, tag=None, client_state=None, save_latest=True, exclude_frozen_parameters=False):
        """DeepSpeed's, plus in the same tag the fp32 masters of the frozen weights and a description of the model."""
        if exclude_frozen_parameters and self.frozen.layers:
            raise ValueError(
                "exclude_frozen_parameters: True would lose every merge: with ReLoRA the frozen weights "
                "are training state; leave it False"
            )
        tag = str(tag if tag is not None else f"global_step{self.global_steps}")
        checkpoint_files.save_frozen(save_dir, tag, self.frozen)
        together("save_checkpoint", lambda: checkpoint_model.save_description(save_dir, tag, self))
        return super().save_checkpoint(save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)

    def load_checkpoint(self, load_dir, tag=None, *args, **kwargs):
        """DeepSpeed's, plus the fp32 masters of the frozen weights.

        With `"checkpoint": {"load_universal": true}` in the engine's config: see `zero.universal`.

        Raises:
            ValueError: on every rank and before anything is overwritten: masters are missing, the checkpoint is of
                another ZeRO stage, precision or rank than this engine, or it has no masters and stores the frozen
                weights in another format.
        """
        latest = universal.LATEST if self.load_universal_checkpoint() else "latest"
        tag = newest_tag(load_dir, latest, self._is_checkpoint) if tag is None else str(tag)
        if tag is None:
            logger.warning(
                "load_checkpoint: no file `%s` in %s names a checkpoint; nothing is loaded", latest, load_dir
            )
            return None, {}
        directory = Path(load_dir) / tag
        if self.load_universal_checkpoint():
            if args or kwargs:
                raise ValueError(
                    f"load_checkpoint: {[*args, *kwargs]} with a universal checkpoint, of which all is "
                    "loaded; leave it out"
                )
            return str(directory), universal.load(self, directory)
        about = checkpoint_model.agreed_description(directory)
        if about is not None and (found := checkpoint_model.problems(about, self)):
            raise ValueError(f"load_checkpoint: {directory} is of another engine: {'; '.join(found)}")
        saved, stored = None if about is None else Storage(**about["frozen"]), None
        masters = self._masters_in(directory, saved)
        if masters is None and self.frozen.storage.replicated:  # DeepSpeed's files hold parameters only
            stored = checkpoint_files.read_owned(directory, self.frozen, checkpoint_files.STORED)
            checkpoint_files.require_all(stored, directory, self.frozen, self.device)
        self._keeps_own_frozen = masters is not None
        path, client_state = super().load_checkpoint(load_dir, tag, *args, **kwargs)
        if path is not None:
            self.shards.drop_gathered_copies()
            if masters is not None:
                self.frozen.publish_masters(masters)
            elif stored is not None:
                self.frozen.publish_stored(stored)
            for ledger in self.frozen.ledgers.values():
                ledger.clear()
            if saved is None or saved.rounds_like(self.frozen.storage):  # else what was lost then is not what is now
                checkpoint_files.restore_ledgers(directory, self.frozen)
            self.num_accumulated = 0
            self._relink()
        return path, client_state

    def _is_checkpoint(self, directory: Path) -> bool:
        return (directory / checkpoint_model.DESCRIPTION).is_file() and universal.is_universal(
            directory
        ) == self.load_universal_checkpoint()

    def _masters_in(self, directory: Path, saved: Storage | None) -> dict[str, Tensor] | None:
        """The fp32 values of what this rank owns in a checkpoint; None where DeepSpeed's files have all there is."""
        now = self.frozen.storage
        if not self.frozen.layers or (
            saved and not saved.with_masters and not now.with_masters and saved.same_bytes(now)
        ):
            return None
        if saved and saved.exact:
            return checkpoint_model.read_base_weights(directory, self.frozen.owned())
        found = checkpoint_files.read_owned(directory, self.frozen)
        checkpoint_files.require_all(found, directory, self.frozen, self.device)
        return found

    def load_module_state_dict(self, checkpoint, *args, **kwargs):
        # The frozen weights come from their masters, after this: they may be stored otherwise in the checkpoint.
        if self._keeps_own_frozen:
            own = {f"{name}.weight": layer.weight for name, layer in self.frozen.layers.items()}
            parameters = {} if self.frozen.storage.replicated else own
            checkpoint["module"] = {name: value for name, value in checkpoint["module"].items() if name not in own} | {
                name: parameter.detach() for name, parameter in parameters.items()
            }
            if checkpoint.get("frozen_param_fragments") is not None:
                checkpoint["frozen_param_fragments"] |= {
                    name: p.ds_tensor.detach() if is_partitioned(p) else p.detach() for name, p in parameters.items()
                }
        super().load_module_state_dict(checkpoint, *args, **kwargs)

    def _relink(self) -> None:
        # DeepSpeed never renews these links once an engine has stepped, and safe_get_full_* would go on
        # reading the tensors from before the load.
        if hasattr(self.optimizer, "_hp_optimizer_states_linked"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _take_model_step(self, lr_kwargs):
        # DeepSpeed skips a non-finite step on all ranks, except at stage 0 in fp32, where it applies the NaN.
        if isinstance(self.optimizer, torch.optim.Optimizer) and not self._gradients_are_finite():
            self._skip_step()
        else:
            super()._take_model_step(lr_kwargs)

    def _gradients_are_finite(self) -> bool:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = (~torch.isfinite(norm)).to(torch.int32)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        self._global_grad_norm = norm.item()  # DeepSpeed does not report one here
        return not bad.item()

    def _skip_step(self) -> None:
        self.zero_grad()
        self._global_grad_norm = float("inf")
        self._step_applied = False
        self.losses = None
        self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

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

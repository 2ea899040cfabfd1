"""What a run says and writes while it trains: lines and a bar on the console, metrics.jsonl, TensorBoard.

Every rank keeps a journal, because some of its figures are sums over all of them; rank 0's is the one that is read.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.checkpoint.job import Written
from relora_ds.lowrank.wrap import count_parameters
from relora_ds.training import report
from relora_ds.training.accounting import Account, StepTraffic
from relora_ds.training.clock import StepClock
from relora_ds.training.console import View
from relora_ds.training.evaluation import Evaluation
from relora_ds.training.guard import LossSpikes, Spike
from relora_ds.training.metrics import MetricsLog, read_metrics
from relora_ds.training.phases import Phase
from relora_ds.training.preflight import Plan
from relora_ds.training.samples import Sample
from relora_ds.zero.engine import ReLoRAEngine
from relora_ds.zero.moments import max_update_over_lr

logger = logging.getLogger(__name__)

UPDATE_METRIC_STEPS = 10  # after a restart: for so many steps the size of the updates is a metric


class Journal:
    """The journal of a run from one checkpoint, or its beginning, on.

    Args:
        resume_step: what metrics.jsonl has past this step is dropped; -1 for all of it.
        may_write: whether the run directory is this run's now.
        spikes: judges the losses as they are collected, unless it does so before their steps are applied.

    Attributes:
        history: (step, phase, Evaluation) of all evaluations of the run.
    """

    def __init__(
        self,
        plan: Plan,
        view: View,
        account: Account,
        spikes: LossSpikes,
        resume_step: int,
        may_write: Callable[[], bool],
    ):
        self._recipe, self._account, self._view, self._spikes = plan.recipe, account, view, spikes
        run_dir, is_first = Path(plan.recipe.run_dir), dist.get_rank() == 0
        self._metrics = MetricsLog(run_dir, enabled=is_first, resume_step=resume_step, may_write=may_write)
        self._metrics.text("recipe", report.as_code(plan.recipe.to_yaml()), account.step)
        self._pending: list[Tensor] = []  # losses of this rank that no other knows of yet
        self._in_spike = False
        history = [_evaluations(run_dir) if is_first else None]
        dist.broadcast_object_list(history, 0)
        self.history: list[tuple[int, str, Evaluation]] = history[0]

    def phase(self, engine: ReLoRAEngine, phase: Phase, traffic: StepTraffic, clock: StepClock) -> None:
        """A phase begins, or goes on."""
        self._engine, self._phase, self._traffic, self._clock = engine, phase, traffic, clock
        trainable, total = count_parameters(engine.module)
        self._view.line(report.phase_line(phase, self._account.step, trainable, total))
        self._write("phase", trainable_parameters=trainable, total_parameters=total)

    def skipped_step(self, spike: Spike | None) -> None:
        """A step that no rank applied."""
        why = str(spike) if spike else "a non-finite loss or gradient"
        self._view.line(f"after step {self._account.step}: {why}; no rank applied the step")
        if spike:
            self._write("spike", **vars(spike))

    def rollback(self, from_step: int, spike: Spike) -> None:
        """The run has gone back to a checkpoint; what was written of the steps that it took back is gone."""
        self._write("spike", **vars(spike), rolled_back_from=from_step)

    def step(self, loss: Tensor, lr: float) -> None:
        """An applied step. Collective where it is logged, and the device is waited for.

        loss: of this rank, nats per token.
        """
        account, recipe, engine = self._account, self._recipe, self._engine
        self._pending.append(loss)
        # After a restart every step goes into the metrics: its first updates are where a bad reset shows.
        after_restart = bool(engine.restarts) and 0 < engine.t - engine.restarts[-1] <= UPDATE_METRIC_STEPS
        shown = account.step % recipe.log.every == 0 or account.step == recipe.total_steps
        figures = ""
        if shown or after_restart:
            seconds, extra = self._clock.mean_seconds(), {}
            if after_restart:
                extra["max_update_over_lr"] = max_update_over_lr(
                    engine.shards,
                    [n for n in engine.shards.names if n.endswith("lora_A")],
                    betas=tuple(recipe.optim.betas),
                    eps=recipe.optim.eps,
                    device=engine.device,
                )
            line = {
                "loss": self.collect_losses(),
                "lr": lr,
                "grad_norm": float(engine.get_global_grad_norm()),
                "tokens": account.tokens,
                "tokens_per_s": recipe.tokens_per_step / seconds,
                "step_s": self._clock.newest,
                "bytes_payload": self._traffic.payload,
                "bytes_wire": self._traffic.wire,
                "total_bytes_wire": account.bytes_wire,
                "full_rank_bytes_wire": account.full_rank_wire,
                "peak_memory_bytes": report.peak_memory(engine.device),
                "restarts": account.restarts,
            }
            self._write("train", **line, **extra)
            figures = f"loss {line['loss']:.4f}  lr {lr:.1e}  {line['tokens_per_s']:,.0f} tok/s"
        self._view.step(account.step, recipe.total_steps, self._phase.name, figures, shown)

    def collect_losses(self) -> float | None:
        """Sum up the losses that are pending, over all ranks, and judge them; returns the newest. Collective."""
        if not self._pending:
            return None
        losses = torch.stack(self._pending)
        dist.all_reduce(losses)
        losses = (losses / dist.get_world_size()).tolist()
        self._pending.clear()
        if not self._spikes.screens:
            for step, loss in enumerate(losses, self._account.step - len(losses) + 1):
                self._report_spike(step, self._spikes.take(loss))
        return losses[-1]

    def _report_spike(self, step: int, spike: Spike | None) -> None:
        if spike is not None:
            self._account.spikes += 1
            self._write("spike", step=step, **vars(spike))
            if not self._in_spike:  # once for steps in a row
                self._view.warn(f"after step {step}: {spike}")
        self._in_spike = spike is not None

    def restart(self) -> None:
        """A restart has taken place."""
        done = self._engine.last_restart
        self._write(
            "restart",
            **{
                "restarts": self._account.restarts,
                "prune_fraction_m": done.prune_fraction_m,
                "prune_fraction_v": done.prune_fraction_v,
                "merge_drift": done.merge_drift,
                "merge_loss": done.merge_loss,
                "merge_loss_total": done.merge_loss_total,
                "update_norms": done.update_norms,
                "relative_update_norms": done.relative_update_norms,
                "restart_s": done.restart_s,
                "checksum": done.checksum,
            },
        )
        self._view.line(report.restart_line(self._account.step, done))

    def evaluation(self, result: Evaluation, samples: list[Sample]) -> None:
        """The network was evaluated."""
        step = self._account.step
        self.history.append((step, self._phase.name, result))
        self._write("eval", **result.figures(), samples=[dataclasses.asdict(sample) for sample in samples])
        self._view.line(report.evaluation_line(step, result, self._account))
        for sample in samples:
            self._view.line(report.sample_line(sample, self._view.width))
        if samples:
            self._metrics.text("samples", report.samples_text(samples), step)

    def checkpoints(self, finished: list[Written]) -> None:
        """Those that were completed in the background, or failed."""
        for done in finished:
            if done.error is not None:
                self._view.warn(
                    f"the checkpoint after step {done.step} failed: {done.error}; training goes on, and "
                    "the checkpoints before it stay"
                )
                continue
            self._write(
                "checkpoint",
                step=done.step,
                bytes=done.bytes,
                new_bytes=done.new_bytes,
                stall_s=done.stall_s,
                write_s=done.write_s,
            )
            self._view.line(report.checkpoint_line(done))

    def close(self) -> None:
        """Write out what is buffered."""
        self._metrics.close()

    def _write(self, kind: str, *, step: int | None = None, **values) -> None:
        self._metrics.write(
            kind, step=self._account.step if step is None else step, t=self._engine.t, phase=self._phase.name, **values
        )


def _evaluations(run_dir: Path) -> list[tuple[int, str, Evaluation]]:
    """Return the evaluations in metrics.jsonl; one that lacks a figure is left out with a warning."""
    found = []
    for line in read_metrics(run_dir):
        if line["kind"] != "eval":
            continue
        values = {field.name: line[field.name] for field in dataclasses.fields(Evaluation) if field.name in line}
        try:
            figures = {name: math.nan if value is None else value + 0 for name, value in values.items()}
            found.append((line["step"], line["phase"], Evaluation(**figures)))
        except TypeError:
            logger.warning("metrics.jsonl: the evaluation after step %d is damaged and left out", line["step"])
    return found

"""Where a run is: one object, which the loop advances, hooks read and checkpoints save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.checkpoint.find import Found
from relora_ds.config import Recipe
from relora_ds.data import Prefetched
from relora_ds.training import compatibility
from relora_ds.training.clock import StepClock
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.phases import Phase
from relora_ds.training.preflight import Plan
from relora_ds.training.spikes import LossSpikes, Spike
from relora_ds.training.totals import RunTotals, StepBytes
from relora_ds.training.validation import Evaluation
from relora_ds.zero.engine import ReLoRAEngine

Arguments = ParamSpec("Arguments")


class Losses:
    """The losses of applied steps: on this rank until they are collected, then judged as means over all ranks."""

    def __init__(self, spikes: LossSpikes):
        self.spikes = spikes
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take the loss of an applied step of this rank, nats per token, without waiting for its device."""
        self._pending.append(loss)

    def collect(self) -> list[float]:
        """Return the means over all ranks of what was added since the last call. Collective."""
        if not self._pending:
            return []
        losses = torch.stack(self._pending)
        dist.all_reduce(losses)
        self._pending.clear()
        return (losses / dist.get_world_size()).tolist()

    def screen(self, loss: Tensor) -> Spike | None:
        """Judge the loss of a step, of this rank, before the step is applied. Collective."""
        mean = loss.clone()
        dist.all_reduce(mean)
        return self.spikes.take(mean.item() / dist.get_world_size())


@dataclass
class RunState:
    """A run between two steps.

    Attributes:
        plan: the checked recipe and its data.
        hooks: all hooks, in the order in which they are called.
        totals: steps, tokens, seconds and bytes so far.
        resumed: the checkpoint that this phase was resumed from, also after a rollback; None if it began anew.
        loader, losses: set when the run directory is open (`Hook.on_begin`).
        phase, engine, clock, flops_per_token: set when a phase begins (`Hook.on_phase`).
        step_bytes: bytes of the newest step.
        history: (step, phase, Evaluation) of all evaluations.
        remarks: what status.json says of the run while it goes well, by subject.
    """

    plan: Plan
    hooks: Sequence[Hook] = ()
    totals: RunTotals = field(default_factory=RunTotals)
    resumed: Found | None = None
    step_bytes: StepBytes = StepBytes()
    history: list[tuple[int, str, Evaluation]] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)
    loader: Prefetched = field(init=False)
    losses: Losses = field(init=False)
    phase: Phase = field(init=False)
    engine: ReLoRAEngine = field(init=False)
    clock: StepClock = field(init=False)
    flops_per_token: float | None = field(init=False)  # of training; None where it is not known

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.plan.recipe

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self.recipe.directory

    @property
    def remark(self) -> str:
        """What status.json says of the run while it goes well."""
        return "; ".join(filter(None, self.remarks.values()))

    @property
    def step(self) -> int:
        """Applied optimizer steps of the run."""
        return self.totals.step

    def emit(
        self,
        event: Callable[Concatenate[Any, RunState, Arguments], None],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> None:
        """Call an event, such as `Hook.on_step`, of every hook."""
        for hook in self.hooks:
            getattr(hook, event.__name__)(self, *args, **kwargs)

    def begin(self, loader: Prefetched, resumed: Found | None) -> None:
        """Start from a checkpoint's totals and losses, or from nothing."""
        saved = resumed.manifest.run if resumed is not None else None
        self.loader, self.resumed = loader, resumed
        if saved is not None:
            self.totals = RunTotals(**saved["account"])
        self.losses = Losses(LossSpikes(self.recipe.guard, saved["losses"] if saved else ()))

    def collect_losses(self) -> float | None:
        """Collect the losses of the steps since the last call, judge them, and return the newest. Collective."""
        losses, spikes = self.losses.collect(), self.losses.spikes
        if not spikes.screens:
            for step, loss in enumerate(losses, self.step - len(losses) + 1):
                if (spike := spikes.take(loss)) is not None:
                    self.totals.spikes += 1
                    self.emit(Hook.on_spike, step, spike)
        return losses[-1] if losses else None

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint saves of the run, beside the engine: JSON values. The losses must be collected."""
        return {
            "phase": self.phase.name,
            "loader": self.loader.state_dict(),
            "account": asdict(self.totals),
            "losses": list(self.losses.spikes.losses),
            **compatibility.of(self.plan),
        }

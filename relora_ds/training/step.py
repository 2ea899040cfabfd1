"""One optimizer step: forward, backward, reduce, Adam and, if it is due, a restart."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relora_ds.training.inputs import inputs_of
from relora_ds.training.spikes import Spike
from relora_ds.training.state import RunState


@dataclass
class Step:
    """A step that was taken.

    Attributes:
        loss: of this rank, nats per token, `[]` fp64 on the device; to read it is to wait for the device.
        lr: learning rate of the step.
        applied: whether the ranks applied it; none does where a loss or gradient is not finite, or a spike is refused.
        spike: the loss spike for which the step was refused; None without one.
        restarted: whether a restart followed it.
        figures: the fields of metrics.jsonl; None for a step that is not logged.
    """

    loss: Tensor
    lr: float
    applied: bool
    spike: Spike | None
    restarted: bool
    figures: dict[str, Any] | None = None


def take_step(run: RunState) -> Step:
    """Take one optimizer step on the next batch. Collective."""
    engine, plan, losses = run.engine, run.plan, run.losses
    lr, restarts_before = engine.get_lr()[0], len(engine.restarts)
    loss, spike = torch.zeros((), dtype=torch.float64, device=engine.device), None
    for micro_batch in run.loader.next_step(is_last=run.totals.step + 1 >= plan.recipe.total_steps):
        inputs = inputs_of(micro_batch, engine, engine.device)
        micro_loss = engine(**inputs).loss  # and nothing else of the output: its logits are large
        loss += micro_loss.detach().double() / plan.accumulation
        if losses.spikes.screens and engine.is_gradient_accumulation_boundary():
            spike = losses.screen(loss)
        # A step with a spike goes the way of one that is not finite: no rank applies it, at any stage.
        engine.backward(micro_loss if spike is None else micro_loss * math.nan)
        engine.step()
    return Step(loss, lr, engine.was_step_applied(), spike, len(engine.restarts) > restarts_before)

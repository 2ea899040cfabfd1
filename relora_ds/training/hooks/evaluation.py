"""When the validation loss is computed, and what the network writes each time."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from relora_ds.checkpoint.run_files import read_metrics
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.samples import draw_samples, first_documents
from relora_ds.training.state import RunState
from relora_ds.training.step import Step
from relora_ds.training.validation import Evaluation, evaluate, rehearse

logger = logging.getLogger(__name__)


class Evaluations(Hook):
    """Evaluates at multiples of `eval.every`, at the end of a cycle without one, and at the end of a phase."""

    _prompts: Tensor
    _newest: int | None = None  # the step of the newest one in this phase
    _has_rehearsed = False

    def on_begin(self, run: RunState) -> None:
        data, recipe = run.plan.data, run.recipe
        history = [_evaluations(run.run_dir) if dist.get_rank() == 0 else []]
        dist.broadcast_object_list(history, 0)
        run.history = history[0]
        self._prompts = first_documents(data.validation, data.eos_id, recipe.eval.samples, recipe.data.seq_len)

    def on_phase(self, run: RunState) -> None:
        self._newest, self._has_rehearsed = None, False

    def on_step(self, run: RunState, step: Step) -> None:
        if not step.applied:
            return
        if not self._has_rehearsed:  # after the first step: now memory holds all that it will, and ZeRO-3 its trace
            self._has_rehearsed = True
            rehearse(run.engine, run.plan.data, **_batches(run))
        if self._is_due(run) and self._newest != run.step:
            self.evaluate(run)

    def evaluate(self, run: RunState) -> None:
        """Evaluate now, whatever is due. Collective."""
        self._newest = run.step
        run.clock.drain()  # what the device still does is the step's
        recipe = run.recipe
        result = evaluate(
            run.engine,
            run.plan.data,
            **_batches(run),
            max_tokens=None if run.step == run.phase.stop else recipe.eval.max_tokens,
        )
        samples = draw_samples(
            run.engine,
            run.plan.tokenizer,
            self._prompts,
            seq_len=recipe.data.seq_len,
            seed=recipe.seed,
            device=run.engine.device,
        )
        run.history.append((run.step, run.phase.name, result))
        run.emit(Hook.on_eval, result, samples)

    def _is_due(self, run: RunState) -> bool:
        step, every, restarts = run.step, run.recipe.eval.every, run.engine.restarts
        due = step == run.phase.stop or (every is not None and step % every == 0)
        if restarts and restarts[-1] == run.engine.t:  # a cycle has just ended
            began = run.phase.start + (restarts[-2] if len(restarts) > 1 else 0)
            due = due or every is None or step // every == began // every
        return due


def _batches(run: RunState) -> dict[str, Any]:
    """Return the shape of an evaluation's batches: no larger than those of training."""
    recipe = run.recipe
    return {
        "seq_len": recipe.data.seq_len,
        "micro_batch_size": recipe.train.micro_batch_size,
        "device": run.engine.device,
    }


def _evaluations(run_dir: Path) -> list[tuple[int, str, Evaluation]]:
    """Return the evaluations in metrics.jsonl; one that lacks a figure is left out with a warning."""
    found = []
    for line in read_metrics(run_dir):
        if line["kind"] != "eval":
            continue
        try:
            found.append((line["step"], line["phase"], Evaluation.of(line)))
        except TypeError:
            logger.warning("metrics.jsonl: the evaluation after step %d is damaged and left out", line["step"])
    return found

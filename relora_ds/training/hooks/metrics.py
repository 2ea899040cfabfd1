"""Events as lines of metrics.jsonl, and as numbers for the loggers of `log.to`: rank 0 writes."""

import dataclasses
from typing import Any

import torch.distributed as dist

from relora_ds.checkpoint.job import Written
from relora_ds.exchange.report import ExchangeReport
from relora_ds.lowrank.wrap import count_parameters
from relora_ds.remote.uploader import Uploaded
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.hooks.loggers import loggers_of
from relora_ds.training.metrics_log import MetricsLog
from relora_ds.training.owned_directory import OwnedDirectory
from relora_ds.training.results import TASKS
from relora_ds.training.samples import Sample
from relora_ds.training.spikes import Spike
from relora_ds.training.state import RunState
from relora_ds.training.step import Step
from relora_ds.training.validation import Evaluation
from relora_ds.zero.restart import RestartReport


class Metrics(Hook):
    """Writes what happens, in numbers. On the other ranks it writes nothing."""

    def __init__(self, directory: OwnedDirectory):
        self._directory = directory
        self._log: MetricsLog | None = None

    def on_begin(self, run: RunState) -> None:
        self.close(run)  # before a rollback
        if dist.get_rank() == 0:
            # What left no checkpoint is forgotten.
            resume_step = -1 if run.resumed is None else run.step
            self._log = MetricsLog(
                run.run_dir,
                resume_step=resume_step,
                may_write=self._directory.is_held,
                loggers=loggers_of(run.recipe, run.run_dir, resume_step),
            )
            self._log.text("recipe", as_code(run.recipe.to_yaml()), run.step)

    def on_phase(self, run: RunState) -> None:
        trainable, total = count_parameters(run.engine.module)
        self._write(run, "phase", trainable_parameters=trainable, total_parameters=total)

    def on_step(self, run: RunState, step: Step) -> None:
        if step.figures is not None:
            self._write(run, "train", **step.figures)

    def on_spike(self, run: RunState, step: int, spike: Spike, rolled_back_from: int | None = None) -> None:
        extra: dict[str, Any] = {} if rolled_back_from is None else {"rolled_back_from": rolled_back_from}
        self._write(run, "spike", step=step, **vars(spike), **extra)

    def on_restart(self, run: RunState, report: RestartReport) -> None:
        values: dict[str, Any] = {name: value for name, value in vars(report).items() if name != "t"}
        self._write(run, "restart", **values | {"restarts": run.totals.restarts})

    def on_exchange(self, run: RunState, report: ExchangeReport) -> None:
        values: dict[str, Any] = {**vars(report), "islands": list(report.islands), "missing": list(report.missing)}
        self._write(run, "sync", sync_s=values.pop("exchange_s"), **values)

    def on_eval(self, run: RunState, evaluation: Evaluation, samples: list[Sample]) -> None:
        figures: dict[str, Any] = evaluation.figures()
        self._write(run, "eval", **figures, samples=[dataclasses.asdict(sample) for sample in samples])
        if self._log is not None and samples:
            self._log.text("samples", samples_text(samples), run.step)

    def on_checkpoint(self, run: RunState, written: Written) -> None:
        if written.error is None:
            values: dict[str, Any] = {
                name: value for name, value in vars(written).items() if name not in ("step", "error")
            }
            self._write(run, "checkpoint", step=written.step, **values)

    def on_upload(self, run: RunState, uploaded: Uploaded) -> None:
        values: dict[str, Any] = {name: value for name, value in vars(uploaded).items() if name != "step"}
        self._write(run, "upload", step=uploaded.step, **values)

    def on_end(self, run: RunState, summary: dict[str, Any]) -> None:
        if TASKS in summary:
            found = {
                f"{task}/{name}": value for task, values in summary[TASKS].items() for name, value in values.items()
            }
            self._write(run, "tasks", scores=found)

    def close(self, run: RunState) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _write(self, run: RunState, kind: str, *, step: int | None = None, **values: Any) -> None:
        if self._log is not None:
            at = run.step if step is None else step
            self._log.write(kind, step=at, t=run.engine.t, phase=run.phase.name, **values)


def samples_text(samples: list[Sample]) -> str:
    """Return samples in Markdown: prompts and continuations, with line ends and layout as they were written."""
    return "\n\n---\n\n".join(
        f"**Prompt**\n\n{as_code(s.prompt)}\n\n**Continuation**\n\n{as_code(s.text)}" for s in samples
    )


def as_code(text: str) -> str:
    """Return a Markdown code block: shown as it is, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())

"""What a run says while it trains: events as sentences, on rank 0."""

import math
from typing import Any

import torch
import torch.distributed as dist

from relora_ds.checkpoint.job import Written
from relora_ds.exchange.report import ExchangeReport
from relora_ds.interop.hf_export import has_code_beside
from relora_ds.interop.lm_scores import rows_of
from relora_ds.lowrank.storage import has_masters
from relora_ds.lowrank.wrap import count_parameters
from relora_ds.methods import method_of
from relora_ds.remote.uploader import Uploaded
from relora_ds.training import compatibility
from relora_ds.training.epochs import epochs_lines
from relora_ds.training.figures import is_shown
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.phases import Phase, phases_of
from relora_ds.training.preflight import Plan
from relora_ds.training.results import TASKS
from relora_ds.training.samples import Sample
from relora_ds.training.spikes import Spike
from relora_ds.training.state import RunState
from relora_ds.training.step import Step
from relora_ds.training.terminal import Terminal
from relora_ds.training.validation import Evaluation
from relora_ds.utils.text import human_bytes, human_count
from relora_ds.zero.accelerator import is_cuda
from relora_ds.zero.restart import RestartReport


class Console(Hook):
    """Prints what happens, and has a progress bar on a terminal."""

    _terminal: Terminal
    _last_spike = -1  # the step of the newest one

    def on_start(self, run: RunState) -> None:
        self._terminal = Terminal(dist.get_rank() == 0, run.recipe.total_steps)

    def on_begin(self, run: RunState) -> None:
        plan, resumed = run.plan, run.resumed
        for line in opening(plan, phases_of(run.recipe), None if resumed is None else run.step):
            self._terminal.line(line)
        found = () if resumed is None else (*resumed.passed_over, *compatibility.changes(resumed.manifest, plan))
        for warning in (*plan.warnings(), *found):
            self._terminal.warn(warning)

    def on_phase(self, run: RunState) -> None:
        trainable, total = count_parameters(run.engine.module)
        self._terminal.line(
            f"step {run.step}  {run.phase.name}: {human_count(trainable)} of {human_count(total)} parameters train "
            f"({100 * trainable / total:.1f} %)"
        )

    def on_step(self, run: RunState, step: Step) -> None:
        if not step.applied:
            why = step.spike or "a non-finite loss or gradient"
            self._terminal.line(f"after step {run.step}: {why}; no rank applied the step")
            return
        figures = "" if step.figures is None else figures_text(step.figures, on_gpu=run.engine.device.type == "cuda")
        self._terminal.step(run.step, run.recipe.total_steps, run.phase.name, figures, is_shown(run))

    def on_spike(self, run: RunState, step: int, spike: Spike, rolled_back_from: int | None = None) -> None:
        if rolled_back_from is not None:
            self._terminal.line(
                f"after step {rolled_back_from}: went back to step {step}, with the data that come next"
            )
        elif not run.losses.spikes.screens:  # else `on_step` says so
            if step != self._last_spike + 1:  # once for steps in a row
                self._terminal.warn(f"after step {step}: {spike}")
            self._last_spike = step

    def on_restart(self, run: RunState, report: RestartReport) -> None:
        drift = "" if report.merge_drift is None else f", drift of the function {report.merge_drift:.1e}"
        sent = human_bytes(report.subspace_bytes)
        subspaces = f" ({report.subspace_s:.2f} s and {sent} sent for the subspaces)" if report.subspace_bytes else ""
        moments = moments_text(run.engine.relora.optimizer_reset, report.prune_fraction_m)
        self._terminal.line(
            f"step {run.step}  restart {report.restarts}: merged, {moments}{drift}, {report.restart_s:.2f} s"
            f"{subspaces}, verified on all ranks"
        )

    def on_exchange(self, run: RunState, report: ExchangeReport) -> None:
        self._terminal.line(exchange_line(run, report))

    def on_eval(self, run: RunState, evaluation: Evaluation, samples: list[Sample]) -> None:
        self._terminal.line(evaluation_line(run, evaluation))
        for sample in samples:
            self._terminal.line(sample_line(sample, self._terminal.width))

    def on_checkpoint(self, run: RunState, written: Written) -> None:
        if written.error is not None:
            self._terminal.warn(
                f"the checkpoint after step {written.step} failed: {written.error}; training continues, and the "
                "checkpoints before it stay"
            )
        else:
            self._terminal.line(checkpoint_line(written))

    def on_upload(self, run: RunState, uploaded: Uploaded) -> None:
        if uploaded.error is not None:
            self._terminal.warn(
                f"the upload of the checkpoint after step {uploaded.step} failed: {uploaded.error}; training "
                "continues, and the next checkpoint is uploaded"
            )
        else:
            self._terminal.line(upload_line(uploaded))

    def on_end(self, run: RunState, summary: dict[str, Any]) -> None:
        terminal = self._terminal
        terminal.close()
        rows = [
            [f"{step} ({phase})", f"{e.val_loss:.4f}", f"{e.ppl:.2f}", f"{e.word_ppl:.1f}", f"{e.bits_per_byte:.4f}"]
            for step, phase, e in run.history
        ]
        terminal.table("Validation", ["after step", "loss", "perplexity", "per word", "bits per byte"], rows)
        if TASKS in summary:
            terminal.table("Tasks", ["task", "metric", "value", "standard error"], rows_of(summary[TASKS]))
        terminal.line(summary["verdict"])
        terminal.line(
            f"{human_count(summary['trainable_parameters'])} of {human_count(summary['total_parameters'])} "
            f"parameters trained; {summary['seconds']:.0f} s of training"
        )
        logs = run.run_dir / "tensorboard"
        curves = f"   curves: tensorboard --logdir {logs}" if "tensorboard" in run.recipe.log.to else ""
        how = "AutoModelForCausalLM.from_pretrained"
        if has_code_beside(run.engine.module):
            how += ", trust_remote_code=True"
        terminal.line(f"model: {run.run_dir / 'export'} ({how}){curves}")

    def close(self, run: RunState) -> None:
        if hasattr(self, "_terminal"):
            self._terminal.close()


def opening(plan: Plan, phases: list[Phase], resumed_at: int | None) -> list[str]:
    """Return what is going to happen, line by line."""
    recipe = plan.recipe
    device = torch.cuda.get_device_name() if is_cuda() else "CPU"
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    lines = [
        f"relora_ds: {compatibility.model_name(recipe)} on {recipe.data.label}, method {recipe.method}; "
        f"{ranks} ({device}), {plan.precision}, ZeRO stage {plan.stage}",
        f"data: {plan.data.train_tokens:,} training and {len(plan.data.validation):,} validation tokens, "
        f"vocabulary {plan.data.vocab_size:,}; {recipe.batch_sequences} x {recipe.data.seq_len} tokens a step",
        *epochs_lines(recipe, plan.extents),
        *_frozen_weights(plan),
    ]
    if recipe.islands.count is not None:
        lines.append(
            f"island {recipe.islands.index} of 0 to {recipe.islands.count - 1}, which meet at {recipe.islands.address}"
        )
    if recipe.checkpoint.remote is not None:
        lines.append(f"checkpoints are uploaded to {recipe.checkpoint.remote}")
    for phase in phases:
        steps = f"{phase.name}: steps {phase.start} to {phase.stop}"
        if phase.method.is_low_rank:
            if phase.name != phase.method.name:
                steps += f" by {phase.method.name}"
            steps += f", restarts after {_some(phase.restarts)}" if phase.restarts else ", no restart"
        lines.append(steps)
    if resumed_at is not None:
        lines.append(f"resuming after step {resumed_at}")
    return lines


def figures_text(figures: dict[str, Any], on_gpu: bool) -> str:
    """Return a step's figures for a person: MFU where it is known, and the peak of memory on a GPU."""
    loss = math.nan if figures["loss"] is None else figures["loss"]
    text = f"loss {loss:.4f}  lr {figures['lr']:.1e}  {figures['tokens_per_s']:,.0f} tok/s"
    if figures["mfu"] is not None:
        text += f"  MFU {100 * figures['mfu']:.1f} %"
    return text + (f"  peak {human_bytes(figures['peak_memory_bytes'])}" if on_gpu else "")


def moments_text(optimizer_reset: str, pruned: float) -> str:
    """Return what a restart did to Adam's moments. pruned: the fraction."""
    kept = {"none": "moments kept", "rotate": "moments rotated"}
    return kept.get(optimizer_reset, f"{100 * pruned:.2f} % of the moments pruned")


def evaluation_line(run: RunState, result: Evaluation) -> str:
    """Return an evaluation, and what was sent to get here."""
    totals = run.totals
    sent = ""
    if totals.bytes_wire:
        ours, full_rank = human_bytes(totals.bytes_wire), human_bytes(totals.full_rank_wire)
        sent = f"; sent per rank so far {ours}, full rank {full_rank}"
    galore = "" if result.galore_loss is None else f" (as GaLore's code counts: {result.galore_loss:.4f})"
    sets = "".join(f", {name} {loss:.4f}" for name, loss in result.sets.items())
    return f"step {run.step}  validation: loss {result.val_loss:.4f}{galore}{sets}, perplexity {result.ppl:.2f}{sent}"


def exchange_line(run: RunState, report: ExchangeReport) -> str:
    """Return who was in an exchange, and what it took."""
    without = f" without {', '.join(report.missing)}" if report.missing else ""
    return (
        f"step {run.step}  exchange {report.round} of {len(report.islands)} islands{without}: "
        f"{human_bytes(report.bytes_sent)} sent, {human_bytes(report.bytes_received)} received, "
        f"{report.exchange_s:.2f} s, of which {report.waited_s:.2f} s for the others"
    )


def sample_line(sample: Sample, width: int) -> str:
    """Return the end of the prompt and what the network wrote, in one line of `width` characters."""
    prompt, text = (" ".join(part.split()) for part in (sample.prompt, sample.text))
    room = width // 3
    prompt = prompt if len(prompt) <= room else f"…{prompt[1 - room :]}"
    line = f"  sample: {prompt} >> {text}"
    return line if len(line) <= width else f"{line[: width - 1]}…"


def checkpoint_line(done: Written) -> str:
    """Return what a complete checkpoint took."""
    size = human_bytes(done.bytes)
    if done.new_bytes < done.bytes:
        size += f", {human_bytes(done.new_bytes)} of them new"
    return (
        f"step {done.step}  checkpoint: {size}; training waited {done.stall_s:.2f} s, written in {done.write_s:.2f} s"
    )


def upload_line(done: Uploaded) -> str:
    """Return what an upload took."""
    size = human_bytes(done.bytes)
    if done.sent_bytes < done.bytes:
        size += f", {human_bytes(done.sent_bytes)} of them sent"
    skipped = f"; {done.skipped} before it skipped" if done.skipped else ""
    return f"step {done.step}  uploaded: {size}, in {done.upload_s:.2f} s{skipped}"


def _frozen_weights(plan: Plan) -> list[str]:
    relora = plan.relora
    if relora is None:
        return []
    stored = plan.precision if relora.frozen_dtype == "auto" else relora.frozen_dtype
    masters = "" if stored == "fp32" else ", no masters"
    if has_masters(relora, plan.precision):
        masters = f", fp32 masters on the {'host' if relora.frozen_master == 'cpu' else 'device'}"
    kind = "owned" if method_of(plan.recipe).has_owners else "frozen"
    return [f"{kind} weights: {stored}{masters}"]


def _some(steps: list[int]) -> str:
    shown = ", ".join(str(s) for s in steps[:8])
    return shown if len(steps) <= 8 else f"{shown}, … ({len(steps)} in total)"

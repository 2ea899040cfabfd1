"""The sentences and tables of a run, and its summary."""

import resource
from pathlib import Path

import torch

from relora_ds.checkpoint.job import Written
from relora_ds.config import Recipe
from relora_ds.lowrank.schedule import scheduled_restarts
from relora_ds.lowrank.storage import has_masters
from relora_ds.training.accounting import Account
from relora_ds.training.console import View
from relora_ds.training.epochs import epochs_line
from relora_ds.training.evaluation import Evaluation
from relora_ds.training.phases import Phase
from relora_ds.training.preflight import Plan
from relora_ds.training.samples import Sample
from relora_ds.utils.text import human_bytes, human_count
from relora_ds.zero.accelerator import is_cuda
from relora_ds.zero.restart import RestartReport


def opening(plan: Plan, phases: list[Phase], resumed_at: int | None) -> list[str]:
    """What is going to happen."""
    recipe = plan.recipe
    device = torch.cuda.get_device_name() if is_cuda() else "CPU"
    stage = plan.deepspeed.get("zero_optimization", {}).get("stage", 0)
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    lines = [
        f"relora_ds: {model_name(recipe)} on {recipe.data.source}, method {recipe.method}; "
        f"{ranks} ({device}), {plan.precision}, ZeRO stage {stage}",
        f"data: {len(plan.data.train):,} training and {len(plan.data.validation):,} validation tokens, "
        f"vocabulary {plan.data.vocab_size:,}; {recipe.batch_sequences} x {recipe.data.seq_len} tokens a step",
        epochs_line(recipe, plan.num_sequences),
        *_frozen_weights(plan),
    ]
    for phase in phases:
        steps = f"{phase.name}: steps {phase.start} to {phase.stop}"
        if phase.method.relora is not None:
            restarts = [
                phase.start + t for t in scheduled_restarts(phase.total_steps, phase.method.relora.restart_every)
            ]
            steps += f", restarts after {_some(restarts)}" if restarts else ", no restart"
        lines.append(steps)
    if resumed_at is not None:
        lines.append(f"resuming after step {resumed_at}")
    return lines


def _frozen_weights(plan: Plan) -> list[str]:
    relora = plan.relora
    if relora is None:
        return []
    stored = plan.precision if relora.frozen_dtype == "auto" else relora.frozen_dtype
    masters = "" if stored == "fp32" else ", no masters"
    if has_masters(relora, plan.precision):
        masters = f", fp32 masters on the {'host' if relora.frozen_master == 'cpu' else 'device'}"
    return [f"frozen weights: {stored}{masters}"]


def phase_line(phase: Phase, step: int, trainable: int, total: int) -> str:
    """A phase begins."""
    return (
        f"step {step}  {phase.name}: {human_count(trainable)} of {human_count(total)} parameters train "
        f"({100 * trainable / total:.1f} %)"
    )


def evaluation_line(step: int, result: Evaluation, account: Account) -> str:
    """The network was evaluated; what it took to get here."""
    sent = (
        ""
        if not account.bytes_wire
        else (
            f"; sent per rank so far {human_bytes(account.bytes_wire)}, full rank {human_bytes(account.full_rank_wire)}"
        )
    )
    galore = "" if result.galore_loss is None else f" (as GaLore's code counts: {result.galore_loss:.4f})"
    return f"step {step}  validation: loss {result.val_loss:.4f}{galore}, perplexity {result.ppl:.2f}{sent}"


def sample_line(sample: Sample, width: int) -> str:
    """The end of the prompt and what the network wrote, in one line of `width`; the whole is in metrics.jsonl."""
    prompt, text = (" ".join(part.split()) for part in (sample.prompt, sample.text))
    room = width // 3
    prompt = prompt if len(prompt) <= room else f"…{prompt[1 - room :]}"
    line = f"  sample: {prompt} >> {text}"
    return line if len(line) <= width else f"{line[: width - 1]}…"


def samples_text(samples: list[Sample]) -> str:
    """Samples in Markdown, for TensorBoard: prompts in bold, line ends and layout as they were written."""
    return "\n\n---\n\n".join(
        f"**Prompt**\n\n{as_code(s.prompt)}\n\n**Continuation**\n\n{as_code(s.text)}" for s in samples
    )


def as_code(text: str) -> str:
    """A Markdown code block: shown as it is, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def restart_line(step: int, done: RestartReport) -> str:
    """A restart took place."""
    drift = "" if done.merge_drift is None else f", drift of the function {done.merge_drift:.1e}"
    return (
        f"step {step}  restart {done.restarts}: merged, {100 * done.prune_fraction_m:.2f} % of the moments pruned"
        f"{drift}, {done.restart_s:.2f} s, verified on all ranks"
    )


def checkpoint_line(done: Written) -> str:
    """A checkpoint is complete."""
    size = human_bytes(done.bytes)
    if done.new_bytes < done.bytes:
        size += f", {human_bytes(done.new_bytes)} of them new"
    return (
        f"step {done.step}  checkpoint: {size}; training waited {done.stall_s:.2f} s, written in {done.write_s:.2f} s"
    )


def summarise(plan: Plan, account: Account, final: Evaluation, trainable: int, total: int) -> dict:
    """summary.json."""
    recipe = plan.recipe
    summary = {
        "method": recipe.method,
        "model": model_name(recipe),
        "precision": plan.precision,
        "world_size": plan.world_size,
        "step": account.step,
        **final.figures(),
        "restarts": account.restarts,
        "skipped_steps": account.skipped,
        "loss_spikes": account.spikes,
        "rollbacks": account.rollbacks,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "tokens": account.tokens,
        "seconds": account.seconds,
        "bytes_payload": account.bytes_payload,
        "bytes_wire": account.bytes_wire,
        "full_rank_bytes_payload": account.full_rank_payload,
        "full_rank_bytes_wire": account.full_rank_wire,
    }
    restarts = "1 restart" if account.restarts == 1 else f"{account.restarts} restarts"
    traffic = ""
    if account.bytes_wire:
        ratio = account.full_rank_wire / account.bytes_wire
        traffic = (
            f"; each rank sent {human_bytes(account.bytes_wire)}, full rank would have sent "
            f"{human_bytes(account.full_rank_wire)} ({ratio:.2f}x)"
        )
    summary["verdict"] = (
        f"{recipe.method}: validation perplexity {final.ppl:.2f} after {account.step} steps, "
        f"{human_count(account.tokens)} tokens and {restarts}{traffic}."
    )
    return summary


def closing(view: View, run_dir: Path, history: list[tuple[int, str, Evaluation]], summary: dict) -> None:
    """The final table and where everything is."""
    rows = [
        [f"{step} ({phase})", f"{e.val_loss:.4f}", f"{e.ppl:.2f}", f"{e.word_ppl:.1f}", f"{e.bits_per_byte:.4f}"]
        for step, phase, e in history
    ]
    view.table("Validation", ["after step", "loss", "perplexity", "per word", "bits per byte"], rows)
    view.line(summary["verdict"])
    view.line(
        f"{human_count(summary['trainable_parameters'])} of {human_count(summary['total_parameters'])} "
        f"parameters trained; {summary['seconds']:.0f} s of training"
    )
    view.line(
        f"model: {run_dir / 'export'} (AutoModelForCausalLM.from_pretrained)   "
        f"curves: tensorboard --logdir {run_dir / 'tensorboard'}"
    )


def model_name(recipe: Recipe) -> str:
    """The preset's or the model's name."""
    return recipe.model.preset or str(recipe.model.name_or_path)


def begin_peak_memory(device: torch.device) -> None:
    """What `peak_memory` is the peak of begins here, on a GPU; a CPU knows only the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated at the most on a GPU, resident at the most on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _some(steps: list[int]) -> str:
    shown = ", ".join(str(s) for s in steps[:8])
    return shown if len(steps) <= 8 else f"{shown}, … ({len(steps)} in all)"

"""What a complete run leaves: a summary, and the exported model with its tokenizer and card."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from relora_ds.checkpoint.run_files import read_json
from relora_ds.data import tokenizer_files
from relora_ds.data.tokenizer import SAMPLES
from relora_ds.interop.hf_export import model_card
from relora_ds.interop.lm_scores import Scores
from relora_ds.interop.sources import is_finished
from relora_ds.lowrank.wrap import count_parameters
from relora_ds.training.compatibility import model_name
from relora_ds.training.lock import lock
from relora_ds.training.state import RunState
from relora_ds.utils.files import write_json, write_text
from relora_ds.utils.text import human_bytes, human_count

logger = logging.getLogger(__name__)

TASKS = "tasks"  # the key of summary.json with scores


def summary_of(run: RunState) -> dict[str, Any]:
    """Return what is in summary.json."""
    recipe, totals, final = run.recipe, run.totals, run.history[-1][2]
    trainable, total = count_parameters(run.engine.module)
    summary = {
        "method": recipe.method,
        "model": model_name(recipe),
        "precision": run.plan.precision,
        "data_fingerprint": run.plan.data.fingerprint,
        "world_size": run.plan.world_size,
        "step": totals.step,
        **final.figures(),
        "restarts": totals.restarts,
        "skipped_steps": totals.skipped,
        "loss_spikes": totals.spikes,
        "rollbacks": totals.rollbacks,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "tokens": totals.tokens,
        "seconds": totals.seconds,
        "bytes_payload": totals.bytes_payload,
        "bytes_wire": totals.bytes_wire,
        "full_rank_bytes_payload": totals.full_rank_payload,
        "full_rank_bytes_wire": totals.full_rank_wire,
    }
    restarts = "1 restart" if totals.restarts == 1 else f"{totals.restarts} restarts"
    traffic = ""
    if totals.bytes_wire:
        ratio = totals.full_rank_wire / totals.bytes_wire
        traffic = (
            f"; each rank sent {human_bytes(totals.bytes_wire)}, full rank would have sent "
            f"{human_bytes(totals.full_rank_wire)} ({ratio:.2f}x)"
        )
    summary["verdict"] = (
        f"{recipe.method}: validation perplexity {final.ppl:.2f} after {totals.step} steps, "
        f"{human_count(totals.tokens)} tokens and {restarts}{traffic}."
    )
    return summary


def write_results(run: RunState, summary: dict[str, Any]) -> None:
    """Write RUN/export and RUN/summary.json. Collective."""
    recipe, tokenizer, export = run.recipe, run.plan.tokenizer, run.run_dir / "export"
    run.engine.save_merged(str(export))
    if dist.get_rank() > 0:
        return
    tokenizer_files.save(tokenizer, export)
    if problem := tokenizer_files.misread(export, tokenizer, SAMPLES, recipe.trust_remote_code):
        logger.warning("%s", problem)
    write_text(export / "README.md", model_card(summary, run.engine.module, recipe.to_yaml()))
    write_json(run.run_dir / "summary.json", summary)


def add_scores(run_dir: Path, scores: Scores) -> None:
    """Add scores on tasks to RUN/summary.json of a finished run; those of the same tasks are replaced.

    Raises:
        ValueError: the run is not finished, or another process has it. OSError: the file cannot be written.
    """
    held = lock(run_dir)
    try:
        summary = read_json(run_dir / "summary.json")
        if not (summary and is_finished(run_dir)):
            raise ValueError(f"{run_dir}: the run is not finished, so it has no summary.json yet")
        write_json(run_dir / "summary.json", {**summary, TASKS: {**summary.get(TASKS, {}), **scores}})
    finally:
        held.undo()

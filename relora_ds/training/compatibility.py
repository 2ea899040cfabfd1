"""What a checkpoint records about its run, and what of it must not change at a resume."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from relora_ds.checkpoint.find import ResumeError
from relora_ds.checkpoint.manifest import Manifest
from relora_ds.config import Recipe, fields
from relora_ds.config.methods import METHODS, method_class, own_keys
from relora_ds.interop.sources import TOKENIZER
from relora_ds.training.phases import WARM_START
from relora_ds.training.preflight import Plan

# Another seed or corpus would repeat some sequences and leave others out; another method has other weights.
_FIXED = ("method", "seed", "data.seq_len", "data.packing", *own_keys())
_ELSEWHERE = ("run_dir", "resume", "overwrite", "init_from")  # of the process, not of the run


def model_name(recipe: Recipe) -> str:
    """Return the name of the model: its preset, or where it comes from."""
    return recipe.model.preset or str(recipe.model.name_or_path)


def of(plan: Plan) -> dict:
    """Return what a manifest says about the run, as JSON values."""
    return {
        "model": model_name(plan.recipe),
        "data": plan.data.fingerprint,
        "total_steps": plan.recipe.total_steps,
        "recipe": _flat(plan),
        "world_size": plan.world_size,
    }


def changes(saved: Manifest, plan: Plan) -> list[str]:
    """Return what differs from the checkpoint's recipe, one line a key; none of it prevents the resume."""
    then, now, known = saved.run["recipe"], _flat(plan), fields.fields_of(Recipe)  # earlier versions had fewer keys
    found = [
        f"resume: {name} was {then.get(name)}, is {now.get(name)}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name) and not (name not in then and now[name] == known[name].default)
    ]
    if saved.run["world_size"] != plan.world_size:
        found.append(f"resume: {saved.run['world_size']} ranks wrote the checkpoint, {plan.world_size} resume it")
    return found


def require_same_run(saved: Manifest, plan: Plan) -> None:
    """Refuse to resume where that would make another run of it.

    Raises:
        ResumeError: naming everything that differs.
    """
    if not saved.is_of_run:
        raise ResumeError(
            "resume: the checkpoint is of a loop of its own (engine.save_checkpoint), not of a run; begin a run with "
            "its weights: init_from=PATH"
        )
    known = fields.fields_of(Recipe)
    then, now = {name: known[name].default for name in _FIXED} | saved.run["recipe"], _flat(plan)  # some keys are newer
    found = [
        f"{name} was {then[name]}, is {now[name]}"
        for name in _FIXED
        if then[name] != now[name] and not _may_change(name, then, now)
    ]
    old, new = then["warm_start_steps"], now["warm_start_steps"]
    if old != new and saved.step > min(old, new):
        found.append(f"warm_start_steps was {old}, is {new}, and the checkpoint is after step {saved.step}")
    before, after = then.get("warm_start_method", Recipe.warm_start_method), plan.recipe.warm_start_method
    if before != after and saved.run["phase"] == WARM_START:
        found.append(f"warm_start_method was {before}, is {after}, and the checkpoint is of the warm start")
    if saved.run["data"] != plan.data.fingerprint:
        found.append(
            "the training data or the tokenizer are others (data.source, data.mix, data.path, data.tokenizer, "
            f"data.max_tokens, or the files themselves{_own_tokenizer(plan)})"
        )
    if plan.recipe.total_steps < saved.step:
        found.append(f"train.steps is {plan.recipe.total_steps}, and the checkpoint is after step {saved.step}")
    if found:
        raise ResumeError("resume: " + "; ".join(found) + ". Change it back, or begin a new run with init_from")


def _own_tokenizer(plan: Plan) -> str:
    """Return what to do where the tokenizer was trained on the corpus, and the run has it."""
    assert plan.recipe.run_dir is not None, "reading a recipe fills it in"
    kept = Path(plan.recipe.run_dir) / "checkpoints" / TOKENIZER
    data = plan.recipe.data
    if data.tokenizer is not None or data.source == "pretokenized" or not kept.is_dir():
        return ""
    return (
        "; the same text gives another tokenizer with another version of sentencepiece: the run's own is "
        f"data.tokenizer={kept}"
    )


def _may_change(name: str, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether a key of `_FIXED` may change from one value to the other."""
    if name == "data.packing":
        return bool(then[name]) == bool(now[name])  # with masks the rows and their order are the same
    return name == "method" and _both_are_chains(then, now)


def _both_are_chains(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether one method can continue from a restart of the other; the engine sees to it that there was one."""
    return all(flat["method"] in METHODS and method_class(flat["method"]).is_chain for flat in (then, now))


def _flat(plan: Plan) -> dict[str, Any]:
    """Return the recipe by dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(plan.recipe).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif name not in _ELSEWHERE:
            flat[name] = value
    return json.loads(json.dumps(flat))

"""A run or a checkpoint as a directory that Hugging Face's libraries load."""

import logging
import shutil
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from relora_ds.checkpoint import manifest
from relora_ds.checkpoint.model import CheckpointWeights
from relora_ds.checkpoint.run_files import read_metrics, read_text
from relora_ds.config.remote_code import is_refusal
from relora_ds.data import tokenizer
from relora_ds.interop import peft
from relora_ds.interop.sources import TOKENIZER, find_checkpoint, is_finished, plain_model
from relora_ds.lowrank.formats import DTYPES
from relora_ds.models.loading import load_model
from relora_ds.utils.files import write_text
from relora_ds.zero.saved_config import save_model

logger = logging.getLogger(__name__)

FORMATS = ("hf", "peft")


def export(
    source: Path | str,
    directory: Path | str,
    *,
    checkpoint: str | None = None,
    dtype: str = "fp32",
    format: str = "hf",
    trust_remote_code: bool = False,
) -> Path:
    """Write a run or a checkpoint as a Hugging Face model, or as a PEFT adapter with its base. One process, on CPU.

    Args:
        source: a run (its end, or its newest checkpoint), a checkpoint, or a directory of checkpoints.
        directory: new or empty (`peft`: or an earlier export of the very same base).
        checkpoint: of a run: which one, such as `step_00005000`.
        dtype: of what is written: fp32, bf16 or fp16. The sum `W + s·B·A` is made in fp32.
        format: "hf", the merged model, or "peft", see `interop.peft`.

    Returns:
        What was exported: the run, or the directory of the checkpoint.

    Raises:
        ValueError: nothing to export in `source`, something in `directory`, or an argument that is not one of these.
    """
    source, directory = Path(source), Path(directory)
    for name, value, known in (("dtype", dtype, DTYPES), ("format", format, FORMATS)):
        if value not in known:
            raise ValueError(f"--{name}: {value} is unknown; use {', '.join(known)}")
    has_base = (directory / peft.BASE).is_dir() and (directory / peft.ADAPTER_CONFIG).is_file()
    if directory.exists() and any(directory.iterdir()) and not (format == "peft" and has_base):
        raise ValueError(f"{directory}: exists and is not empty; choose another directory")
    if format == "hf" and checkpoint is None and is_finished(source):
        _copy_finished(source, directory, dtype, trust_remote_code)
        return source
    tag = find_checkpoint(source.resolve(), checkpoint)  # its parents hold the tokenizer and the recipe
    weights = CheckpointWeights(tag, updates=format == "hf")
    model = plain_model(tag, weights, DTYPES[dtype], trust_remote_code)
    if format == "peft":
        peft.save(weights, model, directory)
    else:
        save_model(model, directory)
    places = [directory, directory / peft.BASE] if format == "peft" else [directory]
    if has_tokenizer := (tag.parent / TOKENIZER).is_dir():
        _try_tokenizer(tag.parent / TOKENIZER, trust_remote_code)
    for place in places:
        if has_tokenizer:
            shutil.copytree(tag.parent / TOKENIZER, place, dirs_exist_ok=True)
    about = {
        "total_parameters": sum(shape.numel() for shape in weights.shapes.values()),
        "restarts": len(weights.contents.restarts),
        **_about(tag),
    }
    write_text(
        directory / "README.md",
        model_card(about, model, read_text(tag.parent.parent / "recipe.yaml"), peft=format == "peft"),
    )
    return tag


def _try_tokenizer(directory: Path, trust_remote_code: bool) -> None:
    """Warn of a tokenizer that cannot be loaded. One whose code is not trusted is copied, too: nothing of it runs."""
    try:
        tokenizer.load(directory, trust_remote_code)
    except ValueError as error:
        if not is_refusal(error.__cause__):
            logger.warning("the tokenizer beside the checkpoint cannot be used (%s); save yours into the export", error)


def merged_state(checkpoint: Path | str) -> dict[str, Tensor]:
    """Export the merged weights in a checkpoint that `engine.save_checkpoint` wrote, also in a loop of your own.

    Args:
        checkpoint: the directory of one step (DeepSpeed's "tag").

    Returns:
        `{parameter name: fp32 CPU tensor}` of the model as it was before `relora_ds.wrap`; tied weights once.

    Raises:
        ValueError: it is none, or incomplete.
    """
    weights = CheckpointWeights(Path(checkpoint))
    return {name: weights.read(name) for name in weights.shapes}


def _copy_finished(run_dir: Path, directory: Path, dtype: str, trust_remote_code: bool) -> None:
    weights = () if dtype == "fp32" else ("*.safetensors*",)  # they are written below, in fewer files perhaps
    shutil.copytree(run_dir / "export", directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*weights))
    if dtype != "fp32":
        save_model(load_model(run_dir / "export", DTYPES[dtype], trust_remote_code), directory)


def _about(tag: Path) -> dict:
    """Return what the run's own files say about a checkpoint; little where it was written outside of a run."""
    saved = manifest.read(tag)
    if not saved.is_of_run:
        return {"model": "A model", "step": saved.step, "verdict": f"Exported from the checkpoint `{tag.name}`."}
    state, step, total = saved.run, saved.step, saved.run["total_steps"]
    about = {
        "model": state["model"],
        "method": state["recipe"]["method"],
        "step": step,
        "tokens": state["account"]["tokens"],
        "restarts": state["account"]["restarts"],
        "verdict": f"Exported from the checkpoint `{tag.name}`, after {step:,} of the run's {total:,} steps "
        f"(phase {state['phase']}).",
    }
    evaluations = [line for line in read_metrics(tag.parent.parent) if line["kind"] == "eval" and line["step"] <= step]
    if evaluations:
        about |= {key: evaluations[-1].get(key) for key in ("val_loss", "ppl")}
        about["evaluated_at"] = evaluations[-1]["step"]
    return about


_ROWS = {
    "method": ("method", "{}"),
    "tokens": ("tokens", "{:,}"),
    "step": ("steps", "{:,}"),
    "restarts": ("restarts", "{}"),
    "total_parameters": ("parameters", "{:,}"),
    "val_loss": ("validation loss (nats per token)", "{:.4f}"),
    "ppl": ("validation perplexity", "{:.2f}"),
    "evaluated_at": ("evaluated after step", "{:,}"),
}


def has_code_beside(model: PreTrainedModel) -> bool:
    """Return True for a model whose code is copied beside its exported weights, and runs when they are loaded."""
    return model._auto_class is not None


def model_card(about: dict, model: PreTrainedModel, recipe_yaml: str, peft: bool = False) -> str:
    """Return the README.md of an exported model.

    Args:
        about: `model`, `verdict`, and what is known of the other keys of summary.json.
        model: what is exported.
        recipe_yaml: the run's recipe, or "".
        peft: for an adapter with its base.
    """
    rows = "\n".join(
        f"| {label} | {text.format(about[key])} |" for key, (label, text) in _ROWS.items() if about.get(key) is not None
    )
    recipe = f"\n<details><summary>Recipe</summary>\n\n```yaml\n{recipe_yaml}```\n\n</details>\n" if recipe_yaml else ""
    return f"""---
library_name: {"peft" if peft else "transformers"}
{"base_model: base" if peft else "pipeline_tag: text-generation"}
tags: [relora, deepspeed]
---

# {about["model"]}, pre-trained with relora_ds

{about["verdict"]}
{_PEFT_USE if peft else _CODE_USE if has_code_beside(model) else ""}
| | |
|---|---|
{rows}
{recipe}"""


_CODE_USE = """
The architecture is not transformers' own. Its code is beside the weights, and loading the model runs it:

```python
model = AutoModelForCausalLM.from_pretrained("DIRECTORY", trust_remote_code=True)
```
"""

_PEFT_USE = """
The adapter is the current cycle's `s·B·A`; everything else is the model in `base/`, and the adapter belongs to this
base only: `adapter_config.json` names the sha256 of its weights as `revision`. `relora_ds.interop.peft.load(DIRECTORY)`
checks it; without relora_ds:

```python
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("DIRECTORY/base"), "DIRECTORY")
```
"""

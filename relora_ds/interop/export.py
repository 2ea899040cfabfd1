"""A finished run as a plain Hugging Face model directory."""

import shutil
from pathlib import Path


def model_card(summary: dict, recipe_yaml: str) -> str:
    """The README.md of an exported model."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [relora, deepspeed]
---

# {summary["model"]}, pre-trained with relora_ds

{summary["verdict"]}

| | |
|---|---|
| method | {summary["method"]} |
| tokens | {summary["tokens"]:,} |
| steps | {summary["step"]:,} |
| restarts | {summary["restarts"]} |
| parameters | {summary["total_parameters"]:,} |
| validation loss (nats per token) | {summary["val_loss"]:.4f} |
| validation perplexity | {summary["ppl"]:.2f} |

<details><summary>Recipe</summary>

```yaml
{recipe_yaml}```

</details>
"""


def export_run(run_dir: Path, directory: Path) -> None:
    """Copy a finished run's exported model to `directory`.

    Raises:
        ValueError: when the run has no export (it did not finish), or `directory` is not empty.
    """
    source = run_dir / "export"
    if not (source / "config.json").is_file():
        raise ValueError(f"{run_dir}: no finished run (it has no export/config.json); let it finish with resume=auto")
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: exists and is not empty; choose another directory")
    shutil.copytree(source, directory, dirs_exist_ok=True)

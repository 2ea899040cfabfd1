"""What a finished run leaves: the exported model with its tokenizer and card, and the summary."""

from pathlib import Path

import torch.distributed as dist

from relora_ds.data import tokenizer_files
from relora_ds.data.tokenizer import SAMPLES
from relora_ds.interop.export import model_card
from relora_ds.training.preflight import Plan
from relora_ds.utils.files import write_json, write_text
from relora_ds.zero.engine import ReLoRAEngine


def write_results(engine: ReLoRAEngine, plan: Plan, summary: dict) -> str | None:
    """Write RUN/export and RUN/summary.json; return what is wrong with the exported tokenizer. Collective."""
    recipe = plan.recipe
    run_dir, export = Path(recipe.run_dir), Path(recipe.run_dir) / "export"
    engine.save_merged(str(export))
    if dist.get_rank() > 0:
        return None
    tokenizer_files.save(plan.tokenizer, export)
    problem = tokenizer_files.misread(export, plan.tokenizer, SAMPLES, recipe.trust_remote_code)
    write_text(export / "README.md", model_card(summary, recipe.to_yaml()))
    write_json(run_dir / "summary.json", summary)
    return problem

"""What the tests of run directories share: a short run, and directories before and after."""

import os
from pathlib import Path

from relora_ds.config import load_recipe
from relora_ds.training.lock import NAME

SETTINGS = (
    "train.steps=6",
    "warm_start_steps=0",
    "checkpoint.every=3",
    "relora.restart_every=4",
    "optim.warmup_steps=1",
    "relora.restart_warmup_steps=1",
    "eval.samples=0",
)
OURS = {"recipe.yaml", "status.json", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "export", NAME}


def snapshot(directory: Path) -> dict:
    """Contents and links by path."""
    return {
        path.relative_to(directory): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in directory.rglob("*")
    }


def recipe_of(run_dir: Path, *overrides: str, config: str | Path = "tiny"):
    return load_recipe(config, [*SETTINGS, f"run_dir={run_dir}", *overrides])

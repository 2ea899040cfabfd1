"""Where metrics go beside metrics.jsonl: one logger a file, chosen by `log.to`."""

import importlib
from collections.abc import Callable
from pathlib import Path

from relora_ds.config import Recipe
from relora_ds.config.rules import nearest
from relora_ds.training.hooks.loggers.logger import Logger

LOGGERS = {
    "tensorboard": "relora_ds.training.hooks.loggers.tensorboard:TensorBoard",
    "wandb": "relora_ds.training.hooks.loggers.wandb:WandB",
    "mlflow": "relora_ds.training.hooks.loggers.mlflow:MLflow",
    "trackio": "relora_ds.training.hooks.loggers.trackio:Trackio",
}


def loggers_of(recipe: Recipe, run_dir: Path, resume_step: int | None) -> list[Logger]:
    """Return the loggers of `log.to`; none of them has written anything yet.

    Args:
        resume_step: what loggers have past this step is not the run's; None for a run that begins.

    Raises:
        ValueError: `log.to` names one that is not known.
    """
    return [_class_of(name)(recipe, run_dir, resume_step) for name in recipe.log.to]


def _class_of(name: str) -> Callable[[Recipe, Path, int | None], Logger]:
    if name not in LOGGERS:
        raise ValueError(f"log.to: {name!r} is no logger{nearest(name, LOGGERS)}; choose from {', '.join(LOGGERS)}")
    module, _, attribute = LOGGERS[name].partition(":")
    found: Callable[[Recipe, Path, int | None], Logger] = getattr(importlib.import_module(module), attribute)
    return found

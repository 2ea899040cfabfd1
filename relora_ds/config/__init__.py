"""The recipe: everything a run needs to know, in one typed tree.

A recipe is a YAML file (or the name of a shipped one, see `recipe_names`) laid over the recipe that it `extends`, if
any, and over the defaults of the dataclasses below, with dotted `section.key=value` overrides on top:

    recipe = load_recipe("quickstart", ["relora.r=64", "train.steps=2000"])

Every mistake in it is reported at once, in one `RecipeError`, with the field, the value and a remedy: starting a job
on a cluster once per typo wastes hours. How sources are merged is in `merge`, how values are spelled in `spelling`,
the checks of the values in `validate`.

The room imports neither torch nor deepspeed, so that tools can read a recipe in milliseconds.
"""

from relora_ds.config.errors import RecipeError
from relora_ds.config.load import load_recipe, read_recipe, recipe_files
from relora_ds.config.methods import METHODS, Method, full_rank, method_of, methods_of
from relora_ds.config.names import DS_CONFIG_DIR, PACKAGE_DIR, ds_config_names, preset_names, recipe_names
from relora_ds.config.relora_config import ReLoRAConfig
from relora_ds.config.runtime import accumulation_steps, resolve_precision
from relora_ds.config.schema import (
    CheckpointConfig,
    CoLAConfig,
    CRNetConfig,
    DataConfig,
    EvalConfig,
    GuardConfig,
    IslandsConfig,
    LogConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    TrainConfig,
)
from relora_ds.config.switch_config import SwitchLoRAConfig

__all__ = [
    "DS_CONFIG_DIR",
    "METHODS",
    "PACKAGE_DIR",
    "CRNetConfig",
    "CheckpointConfig",
    "CoLAConfig",
    "DataConfig",
    "EvalConfig",
    "GuardConfig",
    "IslandsConfig",
    "LoRAConfig",
    "LogConfig",
    "Method",
    "ModelConfig",
    "OptimConfig",
    "ReLoRAConfig",
    "Recipe",
    "RecipeError",
    "SwitchLoRAConfig",
    "TrainConfig",
    "accumulation_steps",
    "ds_config_names",
    "full_rank",
    "load_recipe",
    "method_of",
    "methods_of",
    "preset_names",
    "read_recipe",
    "recipe_files",
    "recipe_names",
    "resolve_precision",
]

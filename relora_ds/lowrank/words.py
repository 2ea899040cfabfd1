"""The names of options in messages: a recipe's keys, or what somebody calls them who writes Python."""

import re

_RECIPE_KEY = re.compile(r"\brelora\.(?=[a-z])")


def in_python(message: str) -> str:
    """Return a message for callers of the Python API: the key `relora.r` of a recipe is their `ReLoRAConfig.r`."""
    return _RECIPE_KEY.sub("ReLoRAConfig.", message).replace("model.name_or_path:", "model:")


def for_everyone(message: str) -> str:
    """Return a message for callers of either kind: the name of the option alone, `r`."""
    return _RECIPE_KEY.sub("", message)

"""Training methods. What distinguishes one from another is one file here, with three seams.

1. `prepare(model)`: surgery on the module tree, and what trains
2. `param_groups(model)`: the optimizer groups it wants
3. `after_step(engine)`: what happens after an applied optimizer step

The trainer knows no method by name. A new one is a file, and a line in `METHODS`.
"""

from relora_ds.config import Recipe
from relora_ds.methods.base import Method
from relora_ds.methods.control import Control
from relora_ds.methods.full import Full
from relora_ds.methods.lora import LoRA
from relora_ds.methods.relora import ReLoRA

METHODS: dict[str, type[Method]] = {"full": Full, "control": Control, "lora": LoRA, "relora": ReLoRA}


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe names."""
    return METHODS[recipe.method](recipe)


__all__ = ["METHODS", "Full", "Method", "method_of"]

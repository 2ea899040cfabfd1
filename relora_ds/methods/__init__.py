"""Training methods: what is special to one is in its file here, see `config.methods.Method`.

1. what the recipe means: `full_rank_steps`, `relora`, `recipe_problems`, `recipe_warnings`, `label`, `speed_key`
2. surgery on the model, and what trains: `problems(model)`, `warnings(model)`, `prepare(model)`
3. the optimizer's groups, and who updates the rest: `param_groups(model)`, `matrix_optimizers(model)`
4. what happens after an applied step, such as a restart: `after_step(engine)`

A new method is a file here and a line in `config.names.METHODS`. Its file imports torch only inside functions.
"""

from relora_ds.config.methods import METHODS, Method, full_rank, method_of, methods_of

__all__ = ["METHODS", "Method", "full_rank", "method_of", "methods_of"]

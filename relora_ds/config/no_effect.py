"""What a recipe may say but has no effect, or not the effect that one would expect."""

from collections.abc import Iterator

from relora_ds.config import data_values, fields
from relora_ds.config.methods import Method, method_of, methods_of, own_keys, warm_start_of
from relora_ds.config.schema import Recipe


def warnings(recipe: Recipe) -> list[str]:
    """Return options without effect, and runs that are not what they look like. Only for a recipe without problems."""
    method = method_of(recipe)
    return [
        *_trust(recipe),
        *_warm_start_warnings(recipe, method),
        *_schedule_warnings(recipe),
        *_island_warnings(recipe),
        *_checkpoint_warnings(recipe),
        *_keys_of_other_methods(recipe, method),
        *method.recipe_warnings(),
        *data_values.warnings(recipe.data),
        *_task_warnings(recipe),
    ]


def _island_warnings(recipe: Recipe) -> Iterator[str]:
    islands = recipe.islands
    if islands.compress_factors != "none" and not any(method.is_chain for method in methods_of(recipe)):
        yield (
            f"islands.compress_factors: {islands.compress_factors} has no effect with method {recipe.method}, which "
            "exchanges no factors"
        )
    if islands.outer_optimizer == "average" and islands.outer_momentum != type(islands).outer_momentum:
        yield f"islands.outer_momentum: {islands.outer_momentum} has no effect with outer_optimizer average"


def _checkpoint_warnings(recipe: Recipe) -> Iterator[str]:
    seconds = recipe.checkpoint.remote_stop_s
    if recipe.checkpoint.remote is None and seconds != type(recipe.checkpoint).remote_stop_s:
        yield f"checkpoint.remote_stop_s: {seconds} has no effect without checkpoint.remote"


def _task_warnings(recipe: Recipe) -> Iterator[str]:
    if recipe.eval.task_files and not recipe.eval.tasks:
        yield f"eval.task_files: {recipe.eval.task_files} has no effect without eval.tasks"


def _trust(recipe: Recipe) -> Iterator[str]:
    if recipe.trust_remote_code:
        yield (
            "trust_remote_code: true: Python files that come with the model are run, with your rights; look at them "
            "first"
        )


def _warm_start_warnings(recipe: Recipe, method: Method) -> Iterator[str]:
    warm, optim = method.warm_start_steps, recipe.optim
    if recipe.warm_start_steps and not method.is_low_rank:
        yield (
            f"warm_start_steps: {recipe.warm_start_steps} has no effect with method {method.name}, which has no "
            "low-rank phase"
        )
    if recipe.carry_moments and not warm:
        yield "carry_moments: true has no effect without a warm start"
    if optim.warm_start_lr is not None and not warm:
        yield f"optim.warm_start_lr: {optim.warm_start_lr} has no effect without a warm start"
    ramp = optim.warmup_steps if optim.warm_start_warmup_steps is None else optim.warm_start_warmup_steps
    if recipe.warm_start_method != type(recipe).warm_start_method and not warm:
        yield f"warm_start_method: {recipe.warm_start_method} has no effect without a warm start"
    if warm:
        ours = {*method.recipe_warnings()}
        for found in warm_start_of(recipe).recipe_warnings():
            if found not in ours:
                yield f"warm_start_method: {recipe.warm_start_method}: {found}"
    if 0 < warm <= ramp:
        yield (
            f"optim.warm_start_warmup_steps: the warm start's {warm} steps end inside its warm-up of {ramp}; its "
            "learning rate never reaches the peak"
        )


def _schedule_warnings(recipe: Recipe) -> Iterator[str]:
    optim = recipe.optim
    if optim.decay_steps is not None and optim.schedule != "wsd":
        yield f"optim.decay_steps: {optim.decay_steps} has no effect with optim.schedule {optim.schedule}"
    if optim.schedule == "constant" and optim.min_lr_ratio != type(optim).min_lr_ratio:
        yield f"optim.min_lr_ratio: {optim.min_lr_ratio} has no effect with optim.schedule constant"


def _keys_of_other_methods(recipe: Recipe, method: Method) -> Iterator[str]:
    if recipe.optim.matrix_lr is not None and not any(phase.has_owners for phase in methods_of(recipe)):
        yield f"optim.matrix_lr: {recipe.optim.matrix_lr} has no effect with method {method.name}"
    known, read = fields.fields_of(Recipe), {section for phase in methods_of(recipe) for section in phase.sections}
    for key in own_keys():
        value = fields.value_of(recipe, key)
        if key.partition(".")[0] not in read and value != known[key].default:
            yield f"{key}: {value} has no effect with method {method.name}"

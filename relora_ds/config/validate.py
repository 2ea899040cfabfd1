"""What makes a recipe's values wrong, or right but without effect: everything that needs neither torch nor a model.

Each problem is one line: `<field>: <value> <what is wrong>; <remedy>`. Nothing stops at the first problem. Every
message names each field that it judged (`load` drops the messages about fields whose value could not be read in the
first place). What needs a model, a corpus or DeepSpeed is checked in `training.preflight`.
"""

from collections.abc import Iterator

from relora_ds.config import data_values, fields, island_values, records, remote_url
from relora_ds.config.curve import Names, ScheduleConfig
from relora_ds.config.methods import Method, full_rank, method_class, method_of, warm_start_of
from relora_ds.config.names import preset_names
from relora_ds.config.paths import missing_files, text_problems
from relora_ds.config.rules import MAX_COUNT, choice, either, is_int, nearest_multiples, tenth
from relora_ds.config.runtime import batch_field
from relora_ds.config.schema import ATTENTION, Recipe

MAX_RESTARTS = 100_000  # their list is kept, saved and drawn
_NAMES = Names(
    *("optim.schedule", "optim.decay_steps", "optim.warmup_steps"),
    *("relora.restart_every", "relora.restart_warmup_steps"),
)
_AMOUNTS = ("train.steps", "train.tokens", "train.batch_sequences", "train.batch_tokens", "train.micro_batch_size")


def problems(recipe: Recipe, check_files: bool = True) -> list[str]:
    """Return everything that keeps `recipe` from running. check_files: also look whether the files it names exist."""
    found = [*fields.problems(recipe), *records.problems(recipe)]
    wrong = {message.partition(":")[0] for message in found}
    method = full_rank(recipe) if "method" in wrong else method_of(recipe)
    found += [
        *recipe.relora.conflicts("relora."),
        *_run_problems(recipe),
        *method.recipe_problems(),
        *_model_problems(recipe),
        *_amount_problems(recipe, method, wrong),
        *data_values.conflicts(recipe.data, wrong),
        *(remote_url.problems(recipe.checkpoint) if "checkpoint.remote" not in wrong else ()),
        *_island_problems(recipe, method, wrong),
        *(missing_files(recipe) if check_files else ()),
    ]
    unusable = list(text_problems(recipe))  # nothing else is said about such text
    named = [message.partition(":")[0] for message in unusable]
    return unusable + [message for message in found if message.partition(":")[0] not in named]


def _run_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.resume is True:
        yield "resume: true is neither false, auto nor a checkpoint's path; use resume=auto"
    elif recipe.overwrite and recipe.resume == "auto":  # what a path has to do with run_dir takes a look at both
        yield "overwrite: true would delete the run that resume: auto continues; set one of the two"
    if recipe.relora.trains == "none":
        yield (
            "relora.trains: none is what the methods fira, apollo, apollo_mini, scale, muon and sst set; use one of "
            "them, e.g. method=muon, or trains=both"
        )
    if recipe.compile and recipe.activation_checkpointing == "inverted":
        yield (
            "activation_checkpointing: inverted reads every layer's β in forward, which compile: true cannot; use "
            "low_rank, or compile=false"
        )
    if recipe.init_from and recipe.warm_start_steps:
        yield (
            f"init_from: {recipe.init_from} together with warm_start_steps: {recipe.warm_start_steps} is not "
            "supported; use warm_start_steps=0"
        )
    betas = recipe.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas: {betas} is not two numbers inside [0, 1); use e.g. [0.9, 0.999]"
    if len(set(recipe.log.to)) < len(recipe.log.to):
        yield f"log.to: {recipe.log.to} names a logger twice; remove one"
    if recipe.guard.on_spike == "rollback" and recipe.checkpoint.every is None:
        yield (
            "guard.on_spike: rollback needs checkpoints to go back to, and checkpoint.every is null; set it, e.g. "
            "checkpoint.every=1000"
        )


def _model_problems(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if "/" not in model.attn_implementation:
        if found := choice("model.attn_implementation", model.attn_implementation, ATTENTION):
            yield found
    elif not recipe.trust_remote_code:
        yield (
            f"model.attn_implementation: {model.attn_implementation} is a kernel of the Hugging Face hub, which is "
            "code; use sdpa, or trust_remote_code=true if you trust it"
        )
    if model.preset is None and model.name_or_path is None:
        yield (
            "model.preset and model.name_or_path: neither is set; set one of them, e.g. "
            f"model.preset={preset_names()[0]}"
        )
    elif model.preset is not None and model.name_or_path is not None:
        yield (
            f"model.preset: {model.preset} and model.name_or_path: {model.name_or_path} are both set; set one of "
            "them to null"
        )
    if model.init == "pretrained" and model.name_or_path is None:
        yield "model.init: pretrained needs model.name_or_path; presets are shapes without weights"


def _island_problems(recipe: Recipe, method: Method, wrong: set[str]) -> Iterator[str]:
    if any(name.startswith(("islands.", "relora.", "guard.")) for name in wrong):
        return
    warm = warm_start_of(recipe) if recipe.warm_start_steps and "warm_start_method" not in wrong else None
    yield from island_values.problems(recipe, method, warm)


def _amount_problems(recipe: Recipe, method: Method, wrong: set[str]) -> Iterator[str]:
    """Yield what is wrong with steps, tokens, batch and the lengths of the phases, as far as they can be computed."""
    usable = not wrong & {*_AMOUNTS, "data.seq_len"}
    for one, other in (_AMOUNTS[0:2], _AMOUNTS[2:4]):
        first, second = fields.value_of(recipe, one), fields.value_of(recipe, other)
        if (first is None) == (second is None):
            usable = False
            yield (
                f"{one} and {other}: neither is set; set one of them"
                if first is None
                else f"{one}: {first} and {other}: {second} are both set; set one of them to null"
            )
    if not usable:
        return
    if batch := _batch_problem(recipe):
        yield batch
    elif recipe.total_steps > MAX_COUNT:
        yield (
            f"train.tokens: {recipe.train.tokens} are {recipe.total_steps} steps of {recipe.tokens_per_step} tokens, "
            f"above {MAX_COUNT}; use fewer, or a larger batch"
        )
    elif not wrong & {"warm_start_steps", "optim.warmup_steps", "optim.warm_start_warmup_steps"}:
        yield from _phase_problems(recipe, method)
        if "warm_start_method" not in wrong and 0 < recipe.warm_start_steps < recipe.total_steps:
            yield from _warm_start_problems(recipe, method)
        if not wrong & {*_NAMES}:
            yield from _curve_problems(recipe, method)


def _batch_problem(recipe: Recipe) -> str | None:
    train, seq_len = recipe.train, recipe.data.seq_len
    if train.batch_tokens is not None and train.batch_tokens % seq_len:
        sizes = nearest_multiples(train.batch_tokens, seq_len * train.micro_batch_size)
        return (
            f"train.batch_tokens: {train.batch_tokens} is not a multiple of data.seq_len {seq_len}; use "
            f"{either('train.batch_tokens', sizes)} (train.micro_batch_size {train.micro_batch_size})"
        )
    if recipe.batch_sequences % train.micro_batch_size:
        name, unit = batch_field(recipe)
        sizes = [size * unit for size in nearest_multiples(recipe.batch_sequences, train.micro_batch_size)]
        return (
            f"{name}: {recipe.batch_sequences * unit} ({recipe.batch_sequences} sequences of data.seq_len "
            f"{seq_len}) is not a multiple of train.micro_batch_size {train.micro_batch_size}; use "
            f"{either(name, sizes)}, or another micro-batch"
        )
    return None


def _phase_problems(recipe: Recipe, method: Method) -> Iterator[str]:
    optim, total, warm = recipe.optim, recipe.total_steps, recipe.warm_start_steps
    length = "train.steps" if recipe.train.steps is not None else "train.tokens, in steps:"
    low_rank = method.is_low_rank
    if low_rank and method.full_rank_steps >= total:
        yield (
            f"warm_start_steps: {warm} leaves no low-rank steps of {length} {total}; use e.g. "
            f"warm_start_steps={tenth(total)}"
        )
        return
    num_steps = method.low_rank_steps if low_rank else total
    what = (
        f"{num_steps} low-rank steps (warm_start_steps {warm}, {length} {total})"
        if low_rank
        else f"{total} steps ({length} {total})"
    )
    if optim.warmup_steps >= num_steps:
        yield (
            f"optim.warmup_steps: {optim.warmup_steps} is not below the {what}; use e.g. "
            f"optim.warmup_steps={tenth(num_steps)}"
        )
    relora = method.relora
    every = relora.restart_every if relora is not None else None
    if relora is not None and is_int(every) and every >= 1:
        if every <= optim.warmup_steps and relora.restart_warmup_steps:
            yield (
                f"relora.restart_every: {every} is not above optim.warmup_steps {optim.warmup_steps}, so the first "
                f"restart would fall into the warm-up; use e.g. optim.warmup_steps={tenth(every)}"
            )
        elif method.num_restarts > MAX_RESTARTS:
            yield (
                f"relora.restart_every: {every} gives {method.num_restarts} restarts, above {MAX_RESTARTS}; use e.g. "
                f"relora.restart_every={-(-num_steps // 100)}"
            )
    ramp = optim.warm_start_warmup_steps
    if low_rank and warm and ramp is not None and ramp >= total:
        yield (
            f"optim.warm_start_warmup_steps: {ramp} is not below the whole run's {total} steps; use e.g. "
            f"optim.warm_start_warmup_steps={tenth(warm)}"
        )


def _warm_start_problems(recipe: Recipe, method: Method) -> Iterator[str]:
    """Yield why the warm start cannot be trained as the recipe says, or would be no other phase."""
    name, optim = recipe.warm_start_method, recipe.optim
    if not method.warm_start_steps:
        return
    if not method_class(name).can_warm_start:
        yield (
            f"warm_start_method: {name} {method_class(name).no_warm_start.format(method=recipe.method)}; use e.g. "
            "warm_start_method=full"
        )
        return
    warm = warm_start_of(recipe)
    if warm.relora is None:
        return
    if name == recipe.method or (warm.relora == method.relora and warm.has_base == method.has_base):
        yield (
            f"warm_start_method: {name} trains as method {recipe.method} does after it; use warm_start_steps=0, or "
            "another one, e.g. warm_start_method=full"
        )
        return
    known = {*recipe.relora.conflicts("relora."), *method.recipe_problems()}
    for found in [*warm.relora.conflicts("relora."), *warm.recipe_problems()]:
        if found not in known:
            yield f"warm_start_method: {name}: {found}"
    every = warm.relora.restart_every
    ramp = optim.warmup_steps if optim.warm_start_warmup_steps is None else optim.warm_start_warmup_steps
    if is_int(every) and warm.relora.restart_warmup_steps and 1 <= every <= ramp and every < recipe.warm_start_steps:
        yield (
            f"warm_start_method: {name} restarts every {every} steps, not above the {ramp} of its warm-up; use e.g. "
            f"optim.warm_start_warmup_steps={tenth(every)}"
        )


def _curve_problems(recipe: Recipe, method: Method) -> Iterator[str]:
    """Yield what is wrong with the last phase's curve, where its numbers are right."""
    optim, relora = recipe.optim, method.relora
    total_steps = method.low_rank_steps or recipe.total_steps
    curve = ScheduleConfig(
        total_steps,
        optim.warmup_steps,
        restart_every=None if relora is None else relora.restart_every,
        restart_warmup_steps=0 if relora is None else relora.restart_warmup_steps,
        schedule=optim.schedule,
        decay_steps=optim.decay_steps,
    )
    if optim.warmup_steps < total_steps and (found := curve.problem(_NAMES)):
        yield found

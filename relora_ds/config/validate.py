"""What makes a recipe's values wrong, or right but without effect.

Pure functions of a recipe; each problem is one line: `<field>: <value> <what is wrong>; <remedy>`. Nothing raises and
nothing stops at the first problem. Every message names each field that it judged (load_recipe drops the messages about
fields whose value it could not read in the first place).
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from relora_ds.config.paths import missing_files, text_problems
from relora_ds.config.rules import (
    MAX_COUNT,
    MAX_TOKENS,
    choice,
    either,
    integer,
    is_int,
    is_names,
    nearest,
    nearest_multiples,
    number,
    tenth,
)

if TYPE_CHECKING:
    from relora_ds.config.schema import Recipe, ReLoRAConfig

METHODS = ("full", "control", "lora", "relora")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
INITS = ("random", "pretrained")
LORA_BASES = ("none", "random", "warm_start")
OPTIMIZER_RESETS = ("magnitude_joint", "magnitude", "random", "zero", "none")
RESTART_INITS = ("kaiming", "orthogonal", "gradient")
FROZEN_DTYPES = ("auto", "fp32", "bf16", "fp16", "int8", "nf4", "fp8")
FROZEN_MASTERS = ("cpu", "device", "none")
FROZEN_PLACEMENTS = ("auto", "replicated", "sharded")
ACTIVATION_CHECKPOINTING = ("none", "full", "selective", "cheap")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
MAX_VOCABULARY = 10**7
MAX_RESTARTS = 100_000  # their list is kept, saved and drawn
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
ON_SPIKE = ("report", "skip", "rollback")
DATA_SOURCES = ("wikitext2", "pydocs", "gutenberg", "c4", "text", "pretokenized")  # and org/name of the hub


def relora_problems(config: "ReLoRAConfig") -> list[str]:
    """Problems of the `relora` section alone. Also checks types: users construct ReLoRAConfig in Python."""
    found = [
        integer("relora.r", config.r, 1, example=128),
        number("relora.lora_alpha", config.lora_alpha, "above 0", lambda x: x > 0, example=32),
        number("relora.lora_dropout", config.lora_dropout, "inside [0, 1)", lambda x: 0 <= x < 1, example=0.0),
        integer("relora.restart_every", config.restart_every, 1, example=5000, optional=True),
        integer("relora.restart_warmup_steps", config.restart_warmup_steps, 0, example=100),
        number("relora.reset_ratio", config.reset_ratio, "inside [0, 1)", lambda x: 0 <= x < 1, example=0.99),
        choice("relora.optimizer_reset", config.optimizer_reset, OPTIMIZER_RESETS),
        choice("relora.restart_init", config.restart_init, RESTART_INITS),
        choice("relora.frozen_dtype", config.frozen_dtype, FROZEN_DTYPES),
        choice("relora.frozen_master", config.frozen_master, FROZEN_MASTERS),
        choice("relora.frozen_placement", config.frozen_placement, FROZEN_PLACEMENTS),
    ]
    every, ramp = config.restart_every, config.restart_warmup_steps
    if is_int(every) and is_int(ramp) and 1 <= every <= ramp:
        found.append(
            f"relora.restart_every: {every} is not above relora.restart_warmup_steps {ramp}, so the learning "
            f"rate would never recover; use e.g. relora.restart_warmup_steps={tenth(every)}"
        )
    if config.restart_init == "gradient" and config.lora_dropout:
        found.append(
            f"relora.restart_init: gradient needs the layer's own input, and relora.lora_dropout "
            f"{config.lora_dropout} hides it; use relora.lora_dropout=0"
        )
    for name in ("target_modules", "exclude_modules", "target_parameters", "trainable_modules"):
        names = getattr(config, name)
        twice = sorted({one for one in names if names.count(one) > 1}) if isinstance(names, list) else []
        if twice and is_names(names):
            found.append(f"relora.{name}: {', '.join(twice)} is given twice; remove one")
    targets = config.target_modules
    if not _is_expression(targets) and not is_names(targets, empty=bool(config.target_parameters)):
        found.append(
            f"relora.target_modules: {targets!r} is neither all-linear, a list of module names or suffixes, nor a "
            "regular expression; use e.g. all-linear or [q_proj, v_proj]"
        )
    excluded = config.exclude_modules
    if excluded is not None and not _is_expression(excluded) and not is_names(excluded, empty=True):
        found.append(
            f"relora.exclude_modules: {excluded!r} is neither a list of module names nor a regular expression; use "
            "e.g. [dt_proj, shared_expert_gate], or null for none"
        )
    if config.target_parameters is not None and not is_names(config.target_parameters, empty=True):
        found.append(
            f"relora.target_parameters: {config.target_parameters!r} is not a list of parameter names; use e.g. "
            "[experts.gate_up_proj, experts.down_proj], or null for none"
        )
    if not isinstance(config.use_rslora, bool):
        found.append(f"relora.use_rslora: {config.use_rslora!r} is not true or false; use e.g. false")
    if config.trainable_modules is not None and not is_names(config.trainable_modules, empty=True):
        found.append(
            f"relora.trainable_modules: {config.trainable_modules!r} is not a list of module names; use e.g. "
            "[embed_tokens, lm_head, norm], or null for embeddings, head and norms"
        )
    return [message for message in found if message]


def _is_expression(value: object) -> bool:
    """Return True for a regular expression, which PEFT takes for module names; "all-linear" is one by its form."""
    if not isinstance(value, str) or any(character.isspace() for character in value):  # a list that is misspelled
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def recipe_problems(
    recipe: "Recipe", preset_names: list[str], ds_config_names: list[str], check_files: bool
) -> list[str]:
    """Everything that keeps `recipe` from running. check_files: also look whether the files it names exist."""
    found = [
        *_run_problems(recipe),
        *_model_problems(recipe, preset_names),
        *relora_problems(recipe.relora),
        *_amount_problems(recipe),
        *_optim_problems(recipe),
        *_data_problems(recipe),
        *_interval_problems(recipe),
        *(missing_files(recipe, ds_config_names) if check_files else ()),
    ]
    unusable = list(text_problems(recipe))  # nothing else is said about such text
    fields = [message.partition(":")[0] for message in unusable]
    return unusable + [message for message in found if message and message.partition(":")[0] not in fields]


def _run_problems(recipe: "Recipe") -> Iterator[str | None]:
    yield choice("method", recipe.method, METHODS)
    yield choice("precision", recipe.precision, PRECISIONS)
    yield choice("lora.base", recipe.lora.base, LORA_BASES)
    yield choice("activation_checkpointing", recipe.activation_checkpointing, ACTIVATION_CHECKPOINTING)
    yield integer("seed", recipe.seed, 0, example=0, most=2**64 - 1)
    yield integer("warm_start_steps", recipe.warm_start_steps, 0, example=0)
    if recipe.resume is True:
        yield "resume: true is neither false, auto nor a checkpoint's path; use resume=auto"
    elif recipe.overwrite and recipe.resume == "auto":  # what a path has to do with run_dir takes a look at both
        yield "overwrite: true would delete the run that resume: auto continues; set one of the two"
    if recipe.compile and recipe.relora.restart_init == "gradient":
        yield (
            "relora.restart_init: gradient looks into every layer's backward, which compile: true hides; set one of "
            "the two"
        )
    if recipe.init_from and recipe.warm_start_steps:
        yield (
            f"init_from: {recipe.init_from} together with warm_start_steps: {recipe.warm_start_steps} is not "
            "available in this version; use warm_start_steps=0"
        )
    if (
        recipe.method == "lora"
        and recipe.lora.base == "warm_start"
        and not (recipe.warm_start_steps or recipe.init_from)
    ):
        yield "lora.base: warm_start has nothing to start from; set warm_start_steps or init_from"
    if (
        recipe.method == "lora"
        and recipe.lora.base == "none"
        and (recipe.init_from or recipe.model.init == "pretrained")
    ):
        field = "init_from" if recipe.init_from else "model.init"
        yield (
            f"{field}: {recipe.init_from or 'pretrained'} does not fit lora.base none, which has no W and would "
            "drop the weights of the wrapped layers; use lora.base=warm_start"
        )
    if recipe.method == "control" and (recipe.init_from or recipe.model.init == "pretrained"):
        field = "init_from" if recipe.init_from else "model.init"
        yield (
            f"{field}: {recipe.init_from or 'pretrained'} does not fit method control, which trains a smaller "
            "network from scratch; use method=full, or remove it"
        )


def _model_problems(recipe: "Recipe", preset_names: list[str]) -> Iterator[str | None]:
    model = recipe.model
    yield choice("model.init", model.init, INITS)
    if "/" not in model.attn_implementation:
        yield choice("model.attn_implementation", model.attn_implementation, ATTENTION)
    elif not recipe.trust_remote_code:
        yield (
            f"model.attn_implementation: {model.attn_implementation} is a kernel of the Hugging Face hub, which is "
            "code; use sdpa, or trust_remote_code=true if you trust it"
        )
    if model.preset is None and model.name_or_path is None:
        yield (
            f"model.preset and model.name_or_path: neither is set; set one of them, e.g. model.preset={preset_names[0]}"
        )
    elif model.preset is not None and model.name_or_path is not None:
        yield (
            f"model.preset: {model.preset} and model.name_or_path: {model.name_or_path} are both set; set one of "
            "them to null"
        )
    if model.preset is not None and model.preset not in preset_names:
        yield (
            f"model.preset: {model.preset!r} is unknown{nearest(model.preset, preset_names)}; "
            f"known: {', '.join(preset_names)}"
        )
    if model.init == "pretrained" and model.name_or_path is None:
        yield "model.init: pretrained needs model.name_or_path; presets are shapes without weights"


def _amount_problems(recipe: "Recipe") -> Iterator[str | None]:
    """Steps, tokens, batch, and the lengths of the phases, as far as they can be computed."""
    train = recipe.train
    amounts = [
        ("train.steps", train.steps),
        ("train.tokens", train.tokens),
        ("train.batch_sequences", train.batch_sequences),
        ("train.batch_tokens", train.batch_tokens),
        ("train.micro_batch_size", train.micro_batch_size),
        ("data.seq_len", recipe.data.seq_len),
    ]
    broken = [
        message
        for name, value in amounts
        if (
            message := integer(
                name,
                value,
                1,
                example=8,
                optional=name != "data.seq_len" and "micro" not in name,
                most=MAX_TOKENS if name == "train.tokens" else MAX_COUNT,
            )
        )
    ]
    yield from broken
    for (one, first), (other, second) in (amounts[0:2], amounts[2:4]):
        if first is None and second is None:
            broken.append(f"{one} and {other}: neither is set; set one of them")
            yield broken[-1]
        elif first is not None and second is not None:
            broken.append(f"{one}: {first} and {other}: {second} are both set; set one of them to null")
            yield broken[-1]
    if broken:
        return
    batch = _batch_problem(recipe)
    yield batch
    if not batch and recipe.total_steps > MAX_COUNT:
        yield (
            f"train.tokens: {train.tokens} are {recipe.total_steps} steps of {recipe.tokens_per_step} tokens, above "
            f"{MAX_COUNT}; use fewer, or a larger batch"
        )
    elif not batch:
        yield from _phase_problems(recipe)


def _batch_problem(recipe: "Recipe") -> str | None:
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


def _phase_problems(recipe: "Recipe") -> Iterator[str | None]:
    optim, total, warm = recipe.optim, recipe.total_steps, recipe.warm_start_steps
    if max(warm, optim.warmup_steps, optim.warm_start_warmup_steps or 0) > MAX_COUNT:
        return
    length = "train.steps" if recipe.train.steps is not None else "train.tokens, in steps:"
    low_rank = recipe.method in ("lora", "relora")
    if low_rank and recipe.full_rank_steps >= total:
        yield (
            f"warm_start_steps: {warm} leaves no low-rank steps of {length} {total}; use e.g. "
            f"warm_start_steps={tenth(total)}"
        )
        return
    num_steps = recipe.low_rank_steps if low_rank else total
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
    every = recipe.relora.restart_every
    restarts = recipe.method == "relora" and every is not None and every >= 1
    if restarts and every <= optim.warmup_steps:
        yield (
            f"relora.restart_every: {every} is not above optim.warmup_steps {optim.warmup_steps}, so the first "
            f"restart would fall into the warm-up; use e.g. optim.warmup_steps={tenth(every)}"
        )
    elif restarts and recipe.num_restarts > MAX_RESTARTS:
        yield (
            f"relora.restart_every: {every} gives {recipe.num_restarts} restarts, above {MAX_RESTARTS}; use e.g. "
            f"relora.restart_every={-(-num_steps // 100)}"
        )
    ramp = optim.warm_start_warmup_steps
    if low_rank and warm and ramp is not None and ramp >= total:
        yield (
            f"optim.warm_start_warmup_steps: {ramp} is not below the whole run's {total} steps; use e.g. "
            f"optim.warm_start_warmup_steps={tenth(warm)}"
        )


def _optim_problems(recipe: "Recipe") -> Iterator[str | None]:
    optim = recipe.optim
    yield number("optim.lr", optim.lr, "above 0", lambda x: x > 0, example=0.001)
    if optim.warm_start_lr is not None:
        yield number("optim.warm_start_lr", optim.warm_start_lr, "above 0", lambda x: x > 0, example=0.001)
    yield integer("optim.warmup_steps", optim.warmup_steps, 0, example=500)
    yield integer("optim.warm_start_warmup_steps", optim.warm_start_warmup_steps, 0, example=500, optional=True)
    yield number("optim.min_lr_ratio", optim.min_lr_ratio, "inside [0, 1]", lambda x: 0 <= x <= 1, example=0.1)
    yield number("optim.eps", optim.eps, "above 0", lambda x: x > 0, example=1e-8)
    yield number("optim.weight_decay", optim.weight_decay, "0 or more", lambda x: x >= 0, example=0.0)
    yield number("optim.max_grad_norm", optim.max_grad_norm, "0 (no clipping) or more", lambda x: x >= 0, example=1.0)
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas: {optim.betas} is not two numbers inside [0, 1); use e.g. [0.9, 0.999]"


def _data_problems(recipe: "Recipe") -> Iterator[str | None]:
    data = recipe.data
    yield source_problem(data.source)
    if data.source in ("text", "pretokenized") and not data.path:
        what = "a file, a directory or a glob" if data.source == "text" else "what python -m relora_ds prepare wrote"
        yield f"data.path: null, and data.source {data.source} reads it; set it to {what}"
    if data.source == "c4" and data.max_tokens is None:
        yield (
            "data.max_tokens: null, and c4 (hundreds of gigabytes) is streamed until so many tokens are there; set "
            f"it to the tokens of the run or less, e.g. data.max_tokens={recipe.train.tokens or 1_000_000_000}"
        )
    if isinstance(data.validation, float) and not 0 < data.validation < 1:
        yield f"data.validation: {data.validation} is not inside (0, 1); use e.g. 0.05, or a path"
    yield integer("data.max_tokens", data.max_tokens, 1, example=1_000_000, optional=True, most=MAX_TOKENS)
    yield integer("data.vocab_size", data.vocab_size, 1, example=8192, most=MAX_VOCABULARY)
    if data.seq_len == 1:
        yield "data.seq_len: 1 leaves no next token to predict; use e.g. 256"


def _keeps_the_switch(recipe: "Recipe") -> bool:
    intervals = (recipe.checkpoint.every, recipe.checkpoint.keep_every)
    return recipe.full_rank_steps > 0 and all(
        is_int(n) and n > 0 and recipe.full_rank_steps % n == 0 for n in intervals
    )


def _interval_problems(recipe: "Recipe") -> Iterator[str | None]:
    yield integer("eval.every", recipe.eval.every, 1, example=500, optional=True)
    yield integer("eval.max_tokens", recipe.eval.max_tokens, 2, example=1_000_000, optional=True, most=MAX_TOKENS)
    yield integer("eval.samples", recipe.eval.samples, 0, example=1, most=1000)
    yield integer("checkpoint.every", recipe.checkpoint.every, 1, example=500, optional=True)
    yield integer("checkpoint.keep_last", recipe.checkpoint.keep_last, 1, example=2)
    yield integer("checkpoint.keep_every", recipe.checkpoint.keep_every, 1, example=5000, optional=True)
    yield integer("log.every", recipe.log.every, 1, example=10)
    yield integer("guard.max_bad_steps", recipe.guard.max_bad_steps, 1, example=10)
    yield integer("guard.watchdog_seconds", recipe.guard.watchdog_seconds, 1, example=1800)
    yield number("guard.spike_zscore", recipe.guard.spike_zscore, "above 0", lambda x: x > 0, example=8.0)
    yield choice("guard.on_spike", recipe.guard.on_spike, ON_SPIKE)
    for logger in recipe.log.to:
        yield choice("log.to", logger, LOGGERS)
    if len(set(recipe.log.to)) < len(recipe.log.to):
        yield f"log.to: {recipe.log.to} names a logger twice; remove one"
    if recipe.log.update_rank and not _keeps_the_switch(recipe):
        yield (
            "log.update_rank: true measures from the checkpoint at the end of the warm start, and the recipe keeps "
            "none; use warm_start_steps, and checkpoint.every and checkpoint.keep_every that divide it"
        )
    if recipe.guard.on_spike == "rollback" and recipe.checkpoint.every is None:
        yield (
            "guard.on_spike: rollback needs checkpoints to go back to, and checkpoint.every is null; set it, e.g. "
            "checkpoint.every=1000"
        )


def recipe_warnings(recipe: "Recipe") -> list[str]:
    """Options without effect, and runs that are not what they look like. For a recipe without problems."""
    return list(_warnings(recipe))


def _warnings(recipe: "Recipe") -> Iterator[str]:
    method, relora, warm = recipe.method, recipe.relora, recipe.warm_start_steps
    if recipe.trust_remote_code:
        yield (
            "trust_remote_code: true: Python files that come with the model are run, with your rights; look at them "
            "first"
        )
    low_rank = method in ("lora", "relora")
    if warm and not recipe.full_rank_steps:
        yield f"warm_start_steps: {warm} has no effect with method lora on lora.base {recipe.lora.base}"
    elif warm and not low_rank:
        yield f"warm_start_steps: {warm} has no effect with method {method}: all of its steps are full-rank"
    if recipe.carry_moments and not (low_rank and recipe.full_rank_steps):
        yield "carry_moments: true has no effect without a warm start"
    if recipe.optim.warm_start_lr is not None and not (low_rank and recipe.full_rank_steps):
        yield f"optim.warm_start_lr: {recipe.optim.warm_start_lr} has no effect without a warm start"
    ramp = (
        recipe.optim.warmup_steps
        if recipe.optim.warm_start_warmup_steps is None
        else recipe.optim.warm_start_warmup_steps
    )
    if low_rank and 0 < recipe.full_rank_steps <= ramp:
        yield (
            f"optim.warm_start_warmup_steps: the warm start's {warm} steps end inside its warm-up of {ramp}; its "
            "learning rate never reaches the peak"
        )
    if recipe.lora.base != "none" and method != "lora":
        yield f"lora.base: {recipe.lora.base} has no effect with method {method}"
    if method == "lora" and recipe.lora.base == "none":
        for name in ("frozen_dtype", "frozen_double_quant", "frozen_master", "frozen_placement"):
            if (value := getattr(relora, name)) != getattr(type(relora)(), name):
                yield f"relora.{name}: {value} has no effect with lora.base none, which has no W"
    if method == "lora" and relora.restart_every is not None:
        yield f"relora.restart_every: {relora.restart_every} has no effect with method lora, which never restarts"
    yield from _data_warnings(recipe)
    if method != "relora":
        return
    if relora.restart_every is None:
        yield "relora.restart_every: null means no restart: this run is LoRA on a frozen W, not ReLoRA"
    elif not recipe.num_restarts:
        yield (
            f"relora.restart_every: {relora.restart_every} is not below the {recipe.low_rank_steps} low-rank steps: "
            "the run has no restart"
        )
    if relora.optimizer_reset == "magnitude":
        yield (
            "relora.optimizer_reset: magnitude prunes the two moments by different masks, which can take steps of "
            "exp_avg/eps after a restart; for reproduction only, use magnitude_joint"
        )
    if relora.optimizer_reset in ("zero", "none") and relora.reset_ratio != type(relora)().reset_ratio:
        yield f"relora.reset_ratio: {relora.reset_ratio} has no effect with optimizer_reset {relora.optimizer_reset}"


def _data_warnings(recipe: "Recipe") -> Iterator[str]:
    data, default = recipe.data, type(recipe.data)()
    ignored = []
    if data.source not in ("text", "c4", "pretokenized"):
        ignored.append("path")
    if data.source != "c4" and "/" not in data.source:
        ignored += ["config", "split"]
    if data.source == "pretokenized":
        ignored += ["text_column", "validation", "tokenizer"]
    for name in ignored:
        if getattr(data, name) != getattr(default, name):
            yield f"data.{name}: {getattr(data, name)} has no effect with data.source {data.source}"


def source_problem(source: str) -> str | None:
    """What is wrong with a `data.source`, as far as its name tells."""
    if source in DATA_SOURCES or "/" in str(source):
        return None
    files = "; JSON lines and parquet are read by data.source=text" if source in ("json", "jsonl", "parquet") else ""
    return (
        f"data.source: {source!r} is unknown{nearest(source, DATA_SOURCES)}; use one of {', '.join(DATA_SOURCES)}, "
        f"or org/name of the Hugging Face hub{files}"
    )


def batch_field(recipe: "Recipe") -> tuple[str, int]:
    """(the field that sets the batch, sequences → its unit: a factor of 1 or seq_len)."""
    if recipe.train.batch_sequences is None:
        return "train.batch_tokens", recipe.data.seq_len
    return "train.batch_sequences", 1

"""Check what needs a model, a corpus, DeepSpeed or this machine, before a process group or a run directory exists.

The values of the recipe are in order here: `config.validate` has looked at them, without torch. A mistake found here
costs seconds and is printed once; the same mistake found by eight ranks after the rendezvous costs minutes and is
printed eight times.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from relora_ds import data
from relora_ds.checkpoint import store
from relora_ds.config import (
    DS_CONFIG_DIR,
    Recipe,
    RecipeError,
    ReLoRAConfig,
    accumulation_steps,
    load_recipe,
    no_effect,
    recipe_files,
    resolve_precision,
)
from relora_ds.data import PreparedData, TrainLoader
from relora_ds.data.preparation import Extent
from relora_ds.data.tokenizer import load as load_tokenizer
from relora_ds.exchange import requirements
from relora_ds.interop import lm_tasks
from relora_ds.interop.sources import config_of, locate, weights_of
from relora_ds.lowrank.storage import storage_problems, storage_warnings
from relora_ds.methods import Method, method_of, methods_of
from relora_ds.methods.proof import Proof, prove
from relora_ds.models import attention, compilation, liger, recompute
from relora_ds.models.build import build_config, meta_model
from relora_ds.training.epochs import short_corpora
from relora_ds.training.remote_rules import early_remote_problems, is_stored
from relora_ds.training.requeue import as_restarted
from relora_ds.training.run_directory import early_problems
from relora_ds.zero import accelerator, ds_config, ds_types, optimizers
from relora_ds.zero.arguments import switching_partition_problems


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A recipe in which nothing is found wrong without its data.

    Attributes:
        deepspeed: the DeepSpeed config, its "auto" values not yet filled.
        precision: fp32, bf16 or fp16.
        accumulation: micro-steps per optimizer step.
        restarted: what the recipe means otherwise because the job was restarted, see `training.requeue`.
        model_warnings: what wrapping leaves out of the model, and what could not be proven.
    """

    recipe: Recipe
    deepspeed: dict
    precision: str
    world_size: int
    accumulation: int
    restarted: str | None = dataclasses.field(default=None, kw_only=True)
    model_warnings: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    @property
    def relora(self) -> ReLoRAConfig | None:
        """Configuration of the low-rank layers over frozen weights; None where there are no such weights."""
        method = method_of(self.recipe)
        return method.relora if method.has_base else None

    def warnings(self) -> list[str]:
        """Options without effect, and runs that are not what they look like."""
        recipe, relora = self.recipe, self.relora
        found = [self.restarted] if self.restarted else []
        found += no_effect.warnings(recipe)
        if recipe.compile and self.stage == 3:
            found.append(
                "compile: true has no effect at ZeRO stage 3, whose hooks stand between all layers; use a "
                "configuration of stages 0 to 2"
            )
        if relora is not None:
            found += storage_warnings(relora, self.precision, self.stage)
        return found + list(self.model_warnings)


@dataclasses.dataclass(frozen=True)
class Plan(Resolved):
    """A checked recipe and what was prepared for it on this host.

    Attributes:
        model_config: of the full network, fitted to the tokenizer.
        extents: of each corpus' training text; () where nothing is said about them.
        tasks: those of `eval.tasks`, with their data; None where there are none.
    """

    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    extents: tuple[Extent, ...] = ()
    tasks: lm_tasks.Tasks | None = None

    def warnings(self) -> list[str]:
        """Add what is to be said about the corpus."""
        return super().warnings() + short_corpora(self.recipe, self.extents)


def resolve(
    name_or_path: str,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    to_run: bool = True,
    cuda_bf16: bool | None = None,
) -> Resolved:
    """Read a recipe and check all that can be checked without its data.

    Args:
        world_size: default WORLD_SIZE, else 1.
        to_run: False for a recipe that is only looked at: its run directory may hold a run.
        cuda_bf16: whether the run's devices are CUDA devices that compute in bf16; None asks this machine.

    Raises:
        RecipeError: every wrong value of the recipe at once; where there is none, everything else at once.
    """
    recipe = load_recipe(name_or_path, overrides)
    recipe, restarted = as_restarted(recipe) if to_run else (recipe, None)
    world_size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    precision = resolve_precision(recipe.precision, accelerator.computes_bf16() if cuda_bf16 is None else cuda_bf16)
    problems = early_problems(recipe, recipe_files(name_or_path)) if to_run else []
    problems += data.problems(recipe.data) + _found(_init_from_problems, recipe)
    found = _found(_model_problems, recipe)
    problems += found or (_found(machine_problems, recipe) if to_run else [])
    accumulation = 0
    try:
        accumulation = accumulation_steps(recipe, world_size)
    except RecipeError as error:
        problems += error.problems
    settings, found = _deepspeed_of(recipe, precision, accumulation)
    problems += found + [text for method in methods_of(recipe) for text in method.deepspeed_problems(settings)]
    if recipe.precision == "auto":
        precision = ds_config.precision_of(settings) or precision
    problems += storage_problems(recipe.relora, precision)
    if reason := optimizers.unavailable(recipe.optim.name):
        problems.append(f"optim.name: {reason}")
    elif not problems:
        problems += _partition_problems(recipe, settings, precision, world_size)
    problems += accelerator.precision_problems(precision) if to_run else []
    problems += attention.precision_problems(recipe.model.attn_implementation, precision)
    if problems:
        raise RecipeError(problems, name_or_path)
    if to_run and (problems := early_remote_problems(recipe)):
        raise RecipeError(problems, name_or_path)
    model_warnings: dict[str, None] = {}
    *before, last = methods_of(recipe)
    for method in [*(method for method in before if method.relora is not None), last]:
        proof = _proof(recipe, precision, method)
        if proof.problems:
            raise RecipeError(proof.problems, name_or_path)
        model_warnings |= dict.fromkeys([*method.warnings(_guessed_model(recipe)), *proof.warnings])
    return Resolved(
        recipe,
        settings,
        precision,
        world_size,
        accumulation,
        restarted=restarted,
        model_warnings=tuple(model_warnings),
    )


def check(name_or_path: str, overrides: Sequence[str] = ()) -> Plan:
    """Read a recipe, check all that can be checked, prepare the data.

    Raises:
        RecipeError: every problem at once. (What needs the tokenized corpus, such as a corpus too small for
            one batch, comes in a second batch, because tokenizing may download and take minutes.)
    """
    resolved = resolve(name_or_path, overrides)
    recipe = resolved.recipe
    try:
        tasks = _tasks_of(recipe)
        prepared = data.prepare(recipe.data, recipe.seed, recipe.trust_remote_code)
        tokenizer = load_tokenizer(prepared.tokenizer_dir, recipe.trust_remote_code)
        config = build_config(
            recipe.model,
            prepared.vocab_size,
            recipe.data.seq_len,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            recipe.trust_remote_code,
        )
        if found := _phases_problems(recipe, meta_model(config)) + _init_from_problems(recipe, config):
            raise RecipeError(found, name_or_path)
        _open_first_weights(recipe)
        loader = TrainLoader(
            prepared.train if prepared.weights is None else prepared.trains(),
            recipe.data.seq_len,
            recipe.batch_sequences,
            recipe.train.micro_batch_size,
            0,
            resolved.world_size,
            recipe.seed,
            prepared.layout,
            weights=prepared.weights,
        )
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error).splitlines(), name_or_path) from error
    return Plan(
        **vars(resolved),
        data=prepared,
        tokenizer=tokenizer,
        model_config=config,
        extents=tuple(
            Extent(len(tokens), rows) for tokens, rows in zip(prepared.trains(), loader.num_sequences, strict=True)
        ),
        tasks=tasks,
    )


def _deepspeed_of(recipe: Recipe, precision: str, accumulation: int) -> tuple[dict, list[str]]:
    """Return (the DeepSpeed configuration, what is wrong with it)."""
    try:
        settings = ds_config.load(_ds_config_path(recipe.deepspeed))
    except ValueError as error:
        return {}, [str(error)]
    return settings, ds_config.problems(
        settings,
        precision=None if recipe.precision == "auto" else precision,
        micro_batch_size=recipe.train.micro_batch_size,
        accumulation=accumulation or None,
        max_grad_norm=recipe.optim.max_grad_norm,
        optimizer=recipe.optim.name,
        lr=recipe.optim.lr,
        betas=(recipe.optim.betas[0], recipe.optim.betas[1]),
        eps=recipe.optim.eps,
        weight_decay=recipe.optim.weight_decay,
        batch_size=recipe.batch_sequences,
    ) or ds_types.problems(settings)


def _model_problems(recipe: Recipe) -> list[str]:
    """Return what is wrong between method and network, which has no storage and a guessed vocabulary."""
    model, mode = _guessed_model(recipe), recipe.activation_checkpointing
    found = attention.problems(model, recipe.model.attn_implementation) + _phases_problems(recipe, model)
    if mode == recompute.INVERTED:
        if found:
            return found
        model = method_of(recipe).prepare(model)  # what trains may be another network
    return found + recompute.problems(model, mode)


def machine_problems(recipe: Recipe) -> list[str]:
    """Return what this machine lacks that the recipe asks for."""
    found = (compilation.problems() if recipe.compile else []) + requirements.machine_problems(recipe.islands)
    if recipe.model.attn_implementation not in attention.EVERYWHERE:
        found += attention.machine_problems(_guessed_model(recipe).config, recipe.model.attn_implementation)
    if recipe.eval.tasks and (reason := lm_tasks.missing("eval.tasks")):
        found.append(reason)
    return found + (liger.problems(_guessed_model(recipe)) if recipe.model.use_liger_kernel else [])


def _tasks_of(recipe: Recipe) -> lm_tasks.Tasks | None:
    """Load the tasks of `eval.tasks` as early as this: at the end of the run it would be too late to notice."""
    wanted = recipe.eval
    return lm_tasks.load(wanted.tasks, wanted.task_files, recipe.data.seq_len - 1) if wanted.tasks else None


def _phases_problems(recipe: Recipe, model: PreTrainedModel) -> list[str]:
    """Return why a phase's method cannot train `model`, each reason once."""
    return list(dict.fromkeys(problem for method in methods_of(recipe) for problem in method.problems(model)))


def _partition_problems(recipe: Recipe, settings: dict, precision: str, world_size: int) -> list[str]:
    """Return why what a rank would have of the network cannot be stepped or switched, each reason once."""
    name, zero, method = recipe.optim.name, settings.get("zero_optimization", {}), method_of(recipe)
    if method.switching is not None and method.relora is not None:
        model = method.prepare(_guessed_model(recipe))
        return switching_partition_problems(model, method.relora, precision, zero.get("stage", 0), world_size)
    if name == "adamw":
        return []
    found = []
    for method in methods_of(recipe):
        groups = method.param_groups(method.prepare(_guessed_model(recipe)))
        found.append(optimizers.partition_problem(name, groups, zero, world_size))
    return [f"optim.name: {reason}" for reason in dict.fromkeys(found) if reason]


def _proof(recipe: Recipe, precision: str, method: Method) -> Proof:
    """Try a small copy of the network."""
    return prove(
        _guessed_config(recipe),
        method.relora,
        base=method.has_base,
        precision=precision,
        attention=recipe.model.attn_implementation,
        documents=recipe.data.masks_documents,
    )


def _guessed_model(recipe: Recipe) -> PreTrainedModel:
    return meta_model(_guessed_config(recipe))


def _guessed_config(recipe: Recipe) -> PretrainedConfig:
    return build_config(
        dataclasses.replace(recipe.model, init="random"),
        recipe.data.vocab_size,
        recipe.data.seq_len,
        trust_remote_code=recipe.trust_remote_code,
    )


def _init_from_problems(recipe: Recipe, config: PretrainedConfig | None = None) -> list[str]:
    """Return what is wrong with the weights at `init_from`; with a `config`, also whether they are of such a model.

    A run that resumes needs them no more.

    Raises:
        ValueError: there are none.
    """
    if not recipe.init_from or _may_resume(recipe):
        return []
    if config is None:
        locate(recipe.init_from, "init_from")
        return []
    theirs = config_of(recipe.init_from, recipe.trust_remote_code, "init_from")
    if theirs.model_type != config.model_type:
        return [
            f"init_from: {recipe.init_from} holds a {theirs.model_type} model, and the recipe's is a "
            f"{config.model_type}; export it, and use model.preset=null model.name_or_path=EXPORT data.tokenizer=EXPORT"
        ]
    there, here = _shapes(theirs), _shapes(config)
    name = next((name for name in [*here, *there] if here.get(name) != there.get(name)), None)
    return (
        []
        if name is None
        else [
            f"init_from: {recipe.init_from} holds another model than the recipe's: {name} is "
            f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here; use the same model section and "
            f"data.tokenizer={recipe.init_from}"
        ]
    )


def _open_first_weights(recipe: Recipe) -> None:
    """Look whether the files that a Hugging Face model consists of hold what is expected, by their headers.

    ValueError where they do not. (A checkpoint is verified when it is read: that takes its time once.)
    """
    source, field = recipe.init_from, "init_from"
    if not source and recipe.model.init == "pretrained":
        source, field = recipe.model.name_or_path, "model.name_or_path"
    if source and not _may_resume(recipe) and locate(source, field)[0] == "huggingface":
        weights_of(source, recipe.trust_remote_code, field)


def _may_resume(recipe: Recipe) -> bool:
    return store.may_resume(recipe.directory, recipe.resume) or is_stored(recipe)


def _shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}


def _found(check: Callable[[Recipe], list[str]], recipe: Recipe) -> list[str]:
    """Return the problems that a check returns, or raises as a ValueError."""
    try:
        return check(recipe)
    except ValueError as error:
        return str(error).splitlines()


def _ds_config_path(name_or_path: str) -> str:
    shipped = DS_CONFIG_DIR / f"{name_or_path}.json"
    return str(shipped if shipped.is_file() else name_or_path)
